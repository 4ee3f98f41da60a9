"""What vLLM asks about a folder of ours: whether it can be served, and what computes each of its linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from layershare.errors import LayershareError
from layershare.manifest import require_whole
from layershare.model.composition import Composition
from layershare.serve.vllm_linear import LayershareLinearMethod, Shard, Store
from layershare.serve.vllm_plugin import METHOD

DENSE = "serve what `layershare export --dense` makes of it"
FUSED: dict[type[nn.Module], tuple[str, ...]] = {
    QKVParallelLinear: ("q_proj", "k_proj", "v_proj"),
    MergedColumnParallelLinear: ("gate_proj", "up_proj"),
}
"""What a fused layer of vLLM's is made of where its model does not say."""


class LayershareVllmConfig(QuantizationConfig):
    """The `quantization_config` of a compressed model.

    `replaced`: what stands in a linear's place, by its name relative to the base model; `None` where it was dropped.
    """

    def __init__(self, replaced: dict[str, Composition | None]) -> None:
        super().__init__()
        self.replaced = replaced
        self.store = Store()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LayershareVllmConfig:
        """Read what stands in `config.json`. Raises `LayershareError` for what cannot be served as it is."""
        from layershare.model.hub import LayershareConfig

        edits = LayershareConfig(**config)
        if edits.slice is not None:
            raise LayershareError(
                "vLLM cannot serve a sliced model: its classes have no place for shortcut matrices, and it has no dense "
                "equivalent; use it with transformers."
            )
        replaced: dict[str, Composition | None] = {}
        for composition in edits.compositions:
            replaced |= dict.fromkeys(composition.names, composition)
            if any(member.conv1d for member in composition.members):
                raise LayershareError(
                    f"vLLM cannot serve the factors of '{composition.names[0]}', which was a Conv1D layer: {DENSE}."
                )
        for each in edits.dropped:
            replaced |= dict.fromkeys(each.members)
        return cls(replaced)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check that a folder is as it was written. Raises `LayershareError` if it is not."""
        if Path(model_name).is_dir():
            require_whole(model_name, weights=True)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """What computes a layer of this name; `None` for what is no linear."""
        if not isinstance(layer, LinearBase):
            return None
        self._require_parallel()
        parent, _, last = prefix.rpartition(".")
        fused = self.packed_modules_mapping.get(last) or FUSED.get(type(layer), ())
        for parts in ((last,), fused):
            shards = [self._shard(f"{parent}.{part}") for part in parts]
            if any(shard.composition or shard.dropped for shard in shards):
                return LayershareLinearMethod(self.store, shards)
        return UnquantizedLinearMethod()

    def _shard(self, name: str) -> Shard:
        """The linear of that name in vLLM's model, which begins as the base model is called there."""
        relative = name
        while relative and relative not in self.replaced:
            relative = relative.partition(".")[2]
        return Shard(
            relative or name, self.replaced.get(relative), relative in self.replaced and not self.replaced[relative]
        )

    def _require_parallel(self) -> None:
        """Raise `LayershareError` where processes cannot be given what they need."""
        parallel = get_current_vllm_config().parallel_config
        compositions = [each for each in self.replaced.values() if each]
        if parallel.pipeline_parallel_size > 1 and any(each.joins(f) for each in compositions for f in each.factors):
            raise LayershareError(
                "Layers of this model share factors, which the stages of pipeline parallelism cannot: use tensor "
                f"parallelism, or {DENSE}."
            )

    def get_name(self) -> Any:
        """The method's name in config.json."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that dense models are served in."""
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: no kernels of our own."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []
