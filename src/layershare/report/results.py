"""Where numbers come from: versions and machine, stored beside every result."""

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from layershare.model.arch import Spec

PACKAGES = ("layershare", "torch", "transformers", "tokenizers", "safetensors", "datasets", "accelerate")


def environment(*more: str) -> dict[str, Any]:
    """Versions of the packages that matter and the machine's processor, cores, memory (bytes) and accelerators.

    `more`: further packages that matter.
    """
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in (*PACKAGES, *more)}},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "accelerators": accelerators,
        },
    }


def shapes(spec: Spec) -> dict[str, list[list[int] | None]]:
    """Role -> [d_in, d_out] of its matrix in every layer, `None` where a layer has none."""
    dims = {(linear.role, linear.layer): [linear.d_in, linear.d_out] for linear in spec.linears}
    return {role: [dims.get((role, layer)) for layer in range(spec.n_layers)] for role in spec.roles}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
