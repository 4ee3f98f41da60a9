"""Adapters of LoRA that vLLM adds to a compressed model: to its layers, whatever computes these, and to nothing else.

What PEFT trains on a factored layer is an adapter of one factor, for which vLLM has no layer. Nothing that vLLM asks a
quantization method comes after it has seen an adapter, so `refuse_on_factors` extends what reads one.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from vllm.lora.lora_model import LoRAModel

from layershare.errors import LayershareError
from layershare.model.checked import MERGE


@cache
def refuse_on_factors() -> None:
    """Have vLLM raise `LayershareError` for adapters that are on parts of its layers; calling it again does nothing."""
    theirs = LoRAModel.from_local_checkpoint

    def read(folder: str, layers: set[str], *args: Any, **options: Any) -> LoRAModel:
        weights = Path(folder) / "adapter_model.safetensors"
        if weights.exists():
            with safe_open(weights, "pt") as file:
                names = [name.split(".") for name in file.keys()]  # noqa: SIM118  # not a mapping
            if any(len(name) > 4 and name[-4] in layers for name in names):  # "….q_proj.coef.lora_A.weight"
                raise LayershareError(
                    f"The adapter in '{folder}' is one of factors, which vLLM cannot add it to: {MERGE}."
                )
        return theirs(folder, layers, *args, **options)

    LoRAModel.from_local_checkpoint = staticmethod(read)
