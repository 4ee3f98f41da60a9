"""A sub-layer of a block rewritten so that it computes the same and is nearer to another block's.

What may be changed is found from the architecture's description: the norm's scale is folded into its readers where the
model is a plain pre-norm decoder; the neurons of an MLP change places; so do attention heads where q, k, v and o are
matrices of their own, query heads within their group and groups as a whole. (Rotary embeddings treat all heads alike,
so whole heads may move.) Where another tensor has a part for each unit, the units stay in their places.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from layershare.formulas.align import assign, assign_heads, columns_apart, foldable, members_of, rows_apart
from layershare.model.arch import READERS, WRITERS, Linear, Part, common_parent
from layershare.model.norms import affine
from layershare.plan.evidence import Evidence


@dataclass(frozen=True)
class Rewritten:
    """Attention or MLP of a block, with the symmetries that are applied to it.

    `weighted`: what counts is the error on the sub-layer's inputs, otherwise that of the weights. `divisor` (width) is
    what the readers take over from the norm's scale, `None` for nothing. `orders`: role -> the old columns of a
    reader, or rows of a writer, in their new order.
    """

    evidence: Evidence
    layer: int
    part: Part
    weighted: bool
    divisor: Tensor | None = None
    orders: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """Role -> linear."""
        return {linear.role: linear for linear in self.evidence.spec.part(self.layer, self.part)}

    def weight(self, role: str) -> Tensor:
        """W′: d_in × d_out = diag(divisor) W P of a reader, PᵀW of a writer."""
        weight = self.evidence.weight(self.linears[role])
        if role in READERS and self.divisor is not None:
            weight = self.divisor[:, None] * weight.double()
        if role in self.orders:
            weight = weight[self.orders[role]] if role in WRITERS else weight[:, self.orders[role]]
        return weight

    def gram(self, role: str) -> Tensor | None:
        """The Gram of what the rewritten linear reads, `None` if inputs do not count."""
        if not self.weighted:
            return None
        gram = self.evidence.stats.gram(self.linears[role]).to(self.evidence.weights.device)
        if role in WRITERS:
            return gram[self.orders[role]][:, self.orders[role]] if role in self.orders else gram
        return gram if self.divisor is None else gram / self.divisor[:, None] / self.divisor

    def others(self) -> dict[str, Tensor]:
        """The tensors beside the weights that are another now, by full names: those of the norm, and biases."""
        spec, weights, changed = self.evidence.spec, self.evidence.weights, {}
        if self.divisor is not None:
            name = _norm_name(self.evidence, self.layer, self.part)
            norm, own = _norm(self.evidence, name)
            scale, shift = affine(norm, own, len(self.divisor))
            nothing, _ = affine(norm, {key: torch.zeros_like(tensor) for key, tensor in own.items()}, len(scale))
            divisor = self.divisor.cpu()
            for key, value in (("weight", scale / divisor - nothing), ("bias", shift / divisor)):
                if key in own:
                    changed[f"{spec.base_prefix}{name}.{key}"] = value.to(own[key].dtype)
        for role, order in self.orders.items():
            if role in READERS and self.linears[role].bias:
                name = f"{spec.base_prefix}{self.linears[role].name}.bias"
                changed[name] = weights.tensor(name)[order]
        return changed


def as_it_is(evidence: Evidence, layer: int, part: Part, *, weighted: bool) -> Rewritten:
    """A sub-layer without any change."""
    return Rewritten(evidence, layer, part, weighted)


def folded(sublayer: Rewritten) -> Rewritten:
    """The sub-layer with its norm's scale in its readers, where the model is a plain pre-norm decoder."""
    evidence = sublayer.evidence
    if isinstance(evidence.spec.prenorm, str):
        return sublayer
    norm, own = _norm(evidence, _norm_name(evidence, sublayer.layer, sublayer.part))
    if not set(own) <= {"weight", "bias"}:
        return sublayer
    scale, _ = affine(norm, own, evidence.spec.prenorm.width)
    return replace(sublayer, divisor=foldable(scale).to(evidence.weights.device))


def aligned(anchor: Rewritten, target: Rewritten) -> Rewritten:
    """The target with its units in the order that brings them nearest to the anchor's, if they can be moved."""
    return _with_neurons_moved(anchor, target) if target.part == "mlp" else _with_heads_moved(anchor, target)


def _with_neurons_moved(anchor: Rewritten, target: Rewritten) -> Rewritten:
    inner = target.linears["down"].d_in
    readers = [role for role in target.linears if role in READERS]
    if any(target.linears[role].d_out % inner for role in readers) or _divided_by_unit(target, inner):
        return target
    costs = rows_apart(anchor.weight("down"), target.weight("down"), target.gram("down"))
    for role in readers:
        ours, theirs = (each.weight(role).split(inner, dim=1) for each in (anchor, target))  # gate_up: two of them
        for a, t in zip(ours, theirs, strict=True):
            costs += columns_apart(a, t, target.gram(role))
    order = assign(costs)
    columns = {role: target.linears[role].d_out // inner for role in readers}
    halves = {role: torch.cat([order + i * inner for i in range(count)]) for role, count in columns.items()}
    return replace(target, orders={**halves, "down": order})


def _with_heads_moved(anchor: Rewritten, target: Rewritten) -> Rewritten:
    linears, heads = target.linears, target.evidence.weights.model.config.num_attention_heads
    if set(linears) != {"q", "k", "v", "o"}:
        return target
    size = linears["q"].d_out // heads
    if linears["o"].d_in != heads * size or linears["v"].d_out != linears["k"].d_out or _divided_by_unit(target, size):
        return target

    def apart(role: str) -> Tensor:
        compare = rows_apart if role == "o" else columns_apart
        return compare(anchor.weight(role), target.weight(role), target.gram(role), size)

    keys, queries = assign_heads(apart("k") + apart("v"), apart("q") + apart("o"))
    keys, queries = members_of(keys, size), members_of(queries, size)
    return replace(target, orders={"q": queries, "k": keys, "v": keys, "o": queries})


def _divided_by_unit(sublayer: Rewritten, size: int) -> bool:
    """Whether something besides weights and biases may belong to single units: a tensor there of another size.

    An MLP may have none of its `size` inner neurons; an attention those of modules alone that all its heads share, such
    as a norm over the `size` elements of a head, not one of a list of them. (Parameters of its own may tie heads
    together, such as those of DiffLlama, which subtracts the second half of its heads from the first.)
    """
    spec = sublayer.evidence.spec
    linears = [linear.name for linear in sublayer.linears.values()]
    own = tuple(f"{spec.base_prefix}{name}." for name in linears)
    parent = f"{spec.base_prefix}{common_parent(linears)}."
    shapes = {
        name.removeprefix(parent): shape
        for name, (shape, _) in spec.tensors.items()
        if name.startswith(parent) and not name.startswith(own)
    }
    if sublayer.part == "mlp":
        return any(size in shape for shape in shapes.values())
    numbered = (any(part.isdigit() for part in name.split(".")) for name in shapes)
    return any(numbered) or any(prod(shape) != size or "." not in name for name, shape in shapes.items())


def _norm_name(evidence: Evidence, layer: int, part: Part) -> str:
    return evidence.spec.sliceable().sublayers[2 * layer + (part == "mlp")].norm


def _norm(evidence: Evidence, name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A norm and its own tensors by their names in it."""
    norm = evidence.weights.model.base_model.get_submodule(name)
    prefix = f"{evidence.spec.base_prefix}{name}"
    return norm, {key: evidence.weights.tensor(f"{prefix}.{key}") for key, _ in norm.named_parameters()}
