"""What vLLM asks about a folder of ours: whether it can be served, and what computes each of its layers."""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from layershare.autoload import METHOD
from layershare.errors import LayershareError
from layershare.manifest import require_whole
from layershare.model.arch import common_parent
from layershare.model.checked import MERGE
from layershare.model.composition import Composition
from layershare.model.describe import role_of
from layershare.model.hub import LayershareConfig
from layershare.model.swap import Dropped
from layershare.serve.vllm_adapters import refuse_on_factors
from layershare.serve.vllm_factors import Store, known
from layershare.serve.vllm_linear import LayershareLinearMethod, Shard

INSTEAD = "serve what `layershare export --to dense` makes of it"
FUSED: dict[type[nn.Module], tuple[str, ...]] = {
    QKVParallelLinear: ("q_proj", "k_proj", "v_proj"),
    MergedColumnParallelLinear: ("gate_proj", "up_proj"),
}
"""What a fused layer of vLLM's is made of where its model does not say."""
INTERLEAVED = "query_key_value"
"""What families call the linear whose outputs are q, k and v of one head after another (Bloom, Falcon)."""


class LayershareVllmConfig(QuantizationConfig):
    """The `quantization_config` of a compressed model, in a vLLM process; holds what its layers share."""

    def __init__(self, compositions: Sequence[Composition], dropped: Sequence[Dropped]) -> None:
        super().__init__()
        self.compositions = compositions
        self.shards = {name: Shard(name, each) for each in compositions for name in each.names}
        self.shards |= {name: Shard(name, dropped=True) for each in dropped for name in each.members}
        self.attentions = {common_parent(each.members) for each in dropped if each.part == "attention"}
        self.store = Store()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LayershareVllmConfig:
        """Read what stands in `config.json`. Raises `LayershareError` for what cannot be served as it is."""
        edits = LayershareConfig(**config)
        if edits.slice is not None:
            raise LayershareError(
                "vLLM cannot serve a sliced model, whose shortcut matrices have no place in its classes, and which has "
                "no dense equivalent: use it with transformers."
            )
        for member in chain.from_iterable(each.members for each in edits.compositions):
            if member.conv1d:
                raise LayershareError(f"vLLM cannot serve the factors of '{member.name}', a Conv1D layer: {INSTEAD}.")
        return cls(edits.compositions, edits.dropped)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check that a folder is as it was written. Raises `LayershareError` if it is not."""
        if Path(model_name).is_dir():
            require_whole(model_name, weights=True)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """What computes a layer of this name; `None` for what is no linear.

        Raises `LayershareError` where processes cannot be given what they need, or adapters not be added.
        """
        parent, _, last = prefix.rpartition(".")
        if isinstance(layer, Attention) and known(parent, self.attentions) is not None:
            leave_out(layer)
        if not isinstance(layer, LinearBase):
            return None
        self._require_parallel()
        self._require_adaptable()
        fused = self.packed_modules_mapping.get(last) or FUSED.get(type(layer), ())
        for parts in ((last,), fused):
            names = [f"{parent}.{part}" for part in parts]
            found = [known(name, self.shards) for name in names]
            if any(found):
                if last == INTERLEAVED and isinstance(layer, QKVParallelLinear):
                    raise LayershareError(
                        f"vLLM reorders the rows of '{prefix}' while it loads them, which factors cannot follow: "
                        f"{INSTEAD}."
                    )
                shards = [self.shards[a] if a else Shard(b) for a, b in zip(found, names, strict=True)]
                return LayershareLinearMethod(self.store, shards)
        return UnquantizedLinearMethod()

    def _require_parallel(self) -> None:
        """Raise `LayershareError` where the model cannot be split as vLLM was told to."""
        config = get_current_vllm_config()
        ways = config.parallel_config.tensor_parallel_size
        hidden = config.model_config.get_hidden_size()
        for member in chain.from_iterable(each.members for each in self.compositions):
            # Key-value heads fewer than processes are repeated.
            inner = {member.d_in, member.d_out} - {hidden} if role_of(member.name) not in ("k", "v") else ()
            if any(width % ways for width in inner):
                raise LayershareError(
                    f"'{member.name}' is {member.d_in} × {member.d_out}, which {ways} processes cannot share: take a "
                    "tensor-parallel size that divides both."
                )

    def _require_adaptable(self) -> None:
        """Raise `LayershareError` where vLLM would add adapters to what is not there, or cannot read."""
        if get_current_vllm_config().lora_config is None:
            return
        refuse_on_factors()
        if any(each.dropped for each in self.shards.values()):
            raise LayershareError(
                "Parts of this model were dropped, and vLLM would add an adapter in their place: "
                f"serve without LoRA, and {MERGE}."
            )

    def get_name(self) -> Any:
        """The method's name in config.json."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that dense models are served in."""
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: there are no kernels of ours."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []


def leave_out(attention: Any) -> None:
    """Make a dropped attention cost nothing: no room in the key-value cache, and zeros without a look at it."""
    attention.get_kv_cache_spec = lambda _: None
    attention.forward = _zeros


def _zeros(query: torch.Tensor, key: Any, value: Any, output_shape: Any = None, **_: Any) -> torch.Tensor:
    return torch.zeros_like(query) if output_shape is None else query.new_zeros(output_shape)
