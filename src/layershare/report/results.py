"""`results.json`: where its numbers come from, and what those who read it can rely on."""

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from layershare.foreign import read_mapping
from layershare.model.arch import Spec

RESULTS = "results.json"
PACKAGES = ("layershare", "torch", "transformers", "tokenizers", "safetensors", "datasets", "accelerate")


_Number = Annotated[float, Field(allow_inf_nan=False)]
_Count = Annotated[int, Field(gt=0)]
_Shape = Annotated[list[_Count], Field(min_length=2, max_length=2)]


class Size(TypedDict):
    """What a model, or a part of it, takes."""

    parameters: _Count
    bytes: _Count
    multiplications: _Count


class Sizes(TypedDict):
    """Of the whole model, and of the matrices that were to be compressed."""

    all: Size
    targets: Size


class Text(TypedDict):
    """A text that was calibrated, trained or measured on."""

    source: str
    blocks: int
    length: int


class Perplexity(TypedDict):
    """A measured perplexity, which may be infinite."""

    value: float


class Measured(TypedDict, total=False):
    """What an evaluation found, on a text, on tasks or on both."""

    text: Text
    dtype: str
    perplexity: Perplexity
    original_perplexity: Perplexity
    kl: float
    top1_agreement: float
    tasks: dict[str, dict[str, Any]]
    original_tasks: dict[str, dict[str, Any]]
    samples: list[dict[str, str]]


class Stages(TypedDict):
    """What was measured before and after healing."""

    before: Measured
    after: Measured


class Healed(TypedDict):
    """What `heal` notes."""

    settings: dict[str, Any]
    needs: dict[str, Any]
    text: Text
    log: list[dict[str, _Number]]
    evaluation: NotRequired[Stages]


class Solved(TypedDict, total=False):
    """What is known of the solution of a group."""

    error: _Number
    rank: int
    parameters: int
    spectrum: dict[str, list[_Number]]


class Machine(TypedDict):
    """What a number was measured on."""

    processor: str
    threads: int
    cores: int | None
    accelerators: list[str]


class Listed(TypedDict):
    """What the list needs of `results.json`."""

    model: str
    method: str
    keep: str | float
    of: str
    before: Sizes
    after: Sizes
    evaluation: NotRequired[Measured]
    healing: NotRequired[Healed]


class Results(Listed):
    """What card and page need of it."""

    original: dict[str, str]
    model_fingerprint: str
    options: dict[str, Any] | None
    calibration: Text | None
    refit: bool
    groups: dict[str, Solved]
    shapes: dict[str, list[_Shape | None]]
    seconds: dict[str, _Number]
    versions: dict[str, str]
    machine: Machine
    date: str
    samples: NotRequired[list[dict[str, str]]]


class Rate(TypedDict):
    """Tokens per second in one phase."""

    phase: str
    batch: int
    model: _Number
    original: _Number | None
    ratio: _Number | None


class Speed(TypedDict):
    """What `bench` notes."""

    original: str | None
    dtype: str
    device: str
    prompt: int
    new: int
    rounds: int
    machine: Machine
    rates: list[Rate]


def read_as(kind: Any, path: Path) -> dict[str, Any]:
    """The content of a file of one of these kinds. Raises `OSError` or `ValueError`; see `foreign.reading`."""
    return checked_as(kind, read_mapping(path))


def checked_as(kind: Any, value: dict[str, Any]) -> dict[str, Any]:
    """The value, if it is of one of these kinds, and all else that is in it. Raises `ValueError` if it is not."""
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        what = "it lacks" if first["type"] == "missing" else f"{first['msg'].lower()} in"
        raise ValueError(f"{what} '{place}'") from error
    return value


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
