"""How transformers' own tensor parallelism and FSDP split layers that share.

A transformers plan names layers with wildcards (`layers.*.self_attn.q_proj`), so one entry covers the dense and the
compressed layers of a partly compressed model, on either side. Each style below therefore decides per module.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,  # pyright: ignore[reportPrivateImportUsage]  # its place in every supported version
    TensorParallelLayer,
)

from layershare.model.layers import ComposedLinear, QuantizedLinear, SharedLinear
from layershare.model.sliced import SlicedNorm

# The style of a dense layer -> the styles of the factor that meets the input and of the one that makes the output
# (None: replicated). Row-wise, the all-reduce then runs over the rank instead of the full width. A factor that is a
# whole matrix is split as the dense one, and so its output is that of the last factor of a product beside it.
_FACTOR_STYLES: dict[str, tuple[str | None, str]] = {
    "colwise": (None, "colwise"),
    "colwise_gather_output": (None, "colwise_gather_output"),
    "rowwise": ("rowwise", "colwise_gather_output"),
    "rowwise_split_input": ("rowwise_split_input", "colwise_gather_output"),
}
_PREFIX = "layershare_"


class FactorStyle(TensorParallelLayer):
    """The dense style for dense layers and shared weights, its counterpart on both factors of a product."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dense: TensorParallelLayer = ALL_PARALLEL_STYLES[name]

    def should_use_local_tensors(self, module) -> Any:
        """A layer that shares adds its slice of the bias to its slice of the output, both as plain tensors."""
        return True

    def shard_param(self, module, param, mesh) -> None:
        """Shard one parameter of `module` itself; of a layer that shares that is the bias."""
        if not isinstance(module, ComposedLinear) or (self.name == "colwise" and not self._whole(module)):
            self.dense.shard_param(module, param, mesh)

    def install_forward(self, module, mesh):
        """Shard and hook the parts that `module` registers: what is shared once."""
        if not isinstance(module, ComposedLinear):
            return self.dense.install_forward(module, mesh)
        for term in module.terms:
            styles = (self.name,) if len(term.factors) == 1 else _FACTOR_STYLES[self.name]
            if self._whole(module):
                styles = tuple(None if style == self.name else style for style in styles)
            for factor, name in zip(term.factors, styles, strict=True):
                if name is not None and factor.registered_by(module.member):
                    style, part = ALL_PARALLEL_STYLES[name], module.part(factor)
                    style.shard_param(part, "weight", mesh)
                    style.install_forward(part, mesh)
        return super().install_forward(module, mesh)

    def transform_inputs_pre_forward(self, module, args, kwargs, mesh) -> Any:
        """Gather the ranks' slices of the input where a pivoted factor picks from all of it."""
        if self.name == "rowwise" and self._whole(module):
            from torch.distributed.tensor import Replicate

            x = self._from_local_last_dim_shard(args[0], mesh, module.in_features)
            args = (x.redistribute(placements=[Replicate()]).to_local(), *args[1:])
        return args, kwargs

    def transform_output_post_forward(self, module, output, mesh) -> Any:
        """Leave the rank's slice of the output that a pivoted factor makes whole."""
        if self.name == "colwise" and self._whole(module):
            from torch.distributed.tensor import DTensor, Replicate, Shard

            output = DTensor.from_local(output, mesh, [Replicate()], run_check=False)
            output = output.redistribute(placements=[Shard(-1)]).to_local()
        return output

    def _whole(self, module: nn.Module) -> bool:
        """Whether a pivoted factor stands where the dense layer would be split, so that none of its end is."""
        side = {"rowwise": "input", "colwise": "output"}.get(self.name, "")
        return isinstance(module, ComposedLinear) and any(factor.pivots == side for factor in module.factors)


# Empty where torch was built without its distributed package.
for _name in _FACTOR_STYLES.keys() & set(ALL_PARALLEL_STYLES):
    ALL_PARALLEL_STYLES.register(_PREFIX + _name, FactorStyle(_name))  # pyright: ignore[reportArgumentType]


def _pattern(name: str) -> str:
    """The plan entry that covers a module: `layers.3.mlp` becomes `layers.*.mlp`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def adapt_tensor_plan(model: PreTrainedModel, plan: dict[str, str]) -> None:
    """Give the entries of `plan` that cover a layer that shares the matching style, in place.

    A sliced model has no plan, so that transformers refuses to split it: a sum over split writers would count the
    shortcuts several times. Nor has a quantized one, whose weights are no parameters.
    """
    if any(isinstance(module, SlicedNorm | QuantizedLinear) for module in model.modules()):
        plan.clear()
    composed = {_pattern(name) for name, module in model.named_modules() if isinstance(module, ComposedLinear)}
    for key in plan.keys() & composed:
        if plan[key] in _FACTOR_STYLES:
            plan[key] = _PREFIX + plan[key]


def adapt_sharding(model: PreTrainedModel, kind: type[nn.Module] = SharedLinear) -> None:
    """Make what is shared an FSDP unit of its own, because layers outside its owner's block use it as well.

    `kind` is the class of it, or of what wraps it.
    """
    shared = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, kind)}
    if plan := model._fsdp_plan:
        plan.update({_pattern(name): "free_full_weight" for name in shared})
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            whole = part._no_split_modules or set()
            part._no_split_modules = type(whole)([*whole, *sorted({*shared.values()} - set(whole))])
