"""Where a model runs, and in which type: what the machine has, and what it is fast at."""

from functools import cache
from typing import Literal

import torch
from transformers import PreTrainedConfig

from layershare.errors import LayershareError, short


def device_of(name: str) -> str:
    """The device of that name, `cpu` or `cuda:1`; `auto` is the accelerator if there is one.

    But not Apple's, which has no float64. Raises `LayershareError` if there is none of that name.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return "cpu" if accelerator is None or accelerator.type == "mps" else accelerator.type
    counts = {"cpu": 1} | ({} if accelerator is None else {accelerator.type: torch.accelerator.device_count()})
    kind, colon, number = name.partition(":")
    if kind not in counts or (number if colon else "0") not in map(str, range(counts[kind])):
        known = [f"{each}:{i}" if i else each for each, count in counts.items() for i in range(count)]
        raise LayershareError(f"There is no device '{short(name)}' here, only {', '.join(known)}; name one, or auto.")
    return kind if kind == "cpu" else name


def training_device(name: str) -> str:
    """The device of that name, as `device_of`, to train on. Raises `LayershareError` for any but the first of its kind.

    transformers trains on the first one that the process sees.
    """
    device = device_of(name)
    kind, _, number = device.partition(":")
    if number not in ("", "0"):
        raise LayershareError(
            f"Training runs on the first device that it sees, not on '{device}': set device={kind}, and let it see "
            f"that one alone (CUDA_VISIBLE_DEVICES={number}, for NVIDIA's)."
        )
    return device


def dtype_of(wanted: str, device: str, config: PreTrainedConfig) -> str:
    """The type in which a model is run; `auto`: that of its weights.

    But for halves on a CPU that multiplies them tens of times more slowly than float32: these are run in float32.
    """
    slow = device == "cpu" and config.dtype != torch.float64 and not multiplies_halves()
    return "float32" if wanted == "auto" and slow else wanted


def precision_of(wanted: Literal["auto", "bfloat16", "float32"], device: str) -> Literal["bfloat16", "float32"]:
    """The type in which a training multiplies; `auto`: bfloat16, but on such a CPU float32."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if device != "cpu" or multiplies_halves() else "float32"


@cache
def multiplies_halves() -> bool:
    """Whether torch has fast products of bfloat16 on this CPU (AVX-512 or newer, on x86)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
