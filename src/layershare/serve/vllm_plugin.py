"""vLLM's entry point (`vllm.general_plugins`): `vllm serve DIR` and `LLM("DIR")` take our folders as they are.

vLLM calls `register` in each of its processes, whatever it serves. What it needs of ours to serve a folder is imported
when it meets one.
"""

from __future__ import annotations

from typing import Any

OLDEST = (0, 32)
"""The first vLLM whose transformers is one that we load with."""
METHOD = "layershare"


def register() -> None:
    """Make `quant_method: layershare` known to vLLM; calling it again does nothing new."""
    import vllm
    from vllm.model_executor.layers.quantization import register_quantization_config

    try:
        if vllm.__version_tuple__[:2] < OLDEST:
            raise ImportError("it is too old")
        from layershare.serve.vllm_config import LayershareVllmConfig as Config
    except ImportError as error:
        Config = _refusing(vllm.__version__, error)
    register_quantization_config(METHOD)(Config)


def _refusing(version: str, cause: ImportError) -> Any:
    """What stands in on a vLLM that we do not fit: others' models go on as before, ours are refused."""
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from layershare.errors import LayershareError

    class Refusing(QuantizationConfig):
        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            raise LayershareError(
                f"vLLM {version} does not fit this layershare ({cause}): install vLLM {'.'.join(map(str, OLDEST))}, or "
                "serve what `layershare export --dense` makes."
            )

    return Refusing
