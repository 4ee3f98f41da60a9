"""vLLM's entry point (`vllm.general_plugins`): `vllm serve DIR` and `LLM("DIR")` take our folders as they are.

vLLM calls `register` in each of its processes, whatever it serves. What serves a folder of ours is imported when vLLM
meets one.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import vllm
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from layershare.autoload import METHOD
from layershare.errors import LayershareError

OLDEST = (0, 32)
"""The first vLLM whose transformers reads our folders."""


class Reader(QuantizationConfig):
    """Reads our `quantization_config`; what it becomes is another class."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The `LayershareVllmConfig`. Raises `LayershareError` as that, and with a vLLM that we do not fit."""
        try:
            if vllm.__version_tuple__[:2] < OLDEST:
                raise ImportError("it is too old")
            from layershare.serve.vllm_config import LayershareVllmConfig
        except ImportError as error:
            raise LayershareError(
                f"This layershare does not fit vLLM {vllm.__version__} ({error}): install vLLM "
                f"{'.'.join(map(str, OLDEST))}, or serve what `layershare export --to dense` makes."
            ) from error
        return LayershareVllmConfig.from_config(config)


def register() -> None:
    """Make our `quant_method` known to vLLM; calling it again changes nothing."""
    register_quantization_config(METHOD)(Reader)
