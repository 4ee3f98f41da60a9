"""Solve deltas: sub-layer by sub-layer, each together with its anchor."""

import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from layershare.formulas.linalg import energy, low_rank, weighted_mean
from layershare.methods.delta.aligned import Rewritten
from layershare.model.arch import Part, Spec, part_of
from layershare.plan.edits import Delta, Edit
from layershare.plan.layout import named_tensors, require_fitting
from layershare.plan.method import Solution, Unit


def delta_units(spec: Spec, edits: Iterable[Edit]) -> tuple[Unit, ...]:
    """The deltas among a plan's edits, those of one sub-layer to the same anchor together."""
    together: dict[tuple[Part, int, tuple[int, ...]], list[Delta]] = {}
    for edit in edits:
        if isinstance(edit, Delta):
            together.setdefault((part_of(edit.role), edit.anchor, edit.layers), []).append(edit)
    units = []
    for (part, anchor, layers), deltas in together.items():
        users = f"{part}.{anchor:02d}+{'-'.join(f'{layer:02d}' for layer in layers)}"
        ranks = "-".join(f"{delta.role}{delta.rank}" for delta in deltas)
        size = sum(spec.linear(*place).parameters for delta in deltas for place in delta.places)
        units.append(Unit(f"{users}.{ranks}", tuple(deltas), size))
    return tuple(units)


def solve_deltas(deltas: Sequence[Delta], spec: Spec, views: Mapping[int, Rewritten], init: str) -> Solution:
    """The tensors of the deltas of a sub-layer, and of each the error Σ‖Xₜ(Wₜ − W − AₜBₜ)‖² / Σ‖XₜWₜ‖².

    `views`: layer -> the sub-layer as it is subtracted, the anchor's first.
    """
    tensors: dict[str, Tensor] = {}
    for view in views.values():
        tensors |= view.others()
    require_fitting(tensors)
    facts = {}
    for delta in deltas:
        base, made, error = _deltas(delta, views, init)
        own = {spec.linear(delta.role, layer).name: pair for layer, pair in made.items()}
        tensors |= named_tensors(spec, delta, base, own, base.dtype)
        facts[delta.id] = {"error": error}
    return Solution(tensors, facts)


def _deltas(
    edit: Delta, views: Mapping[int, Rewritten], init: str
) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]], float]:
    """The shared weight W, of every layer of the edit Aₜ and Bₜ, and the error.

    W is the anchor's own, or (ΣGᵢ)⁻¹ΣGᵢWᵢ of all users if the anchor has a delta, too. It is rounded to the dtype that
    it is stored in before it is subtracted.
    """
    role = edit.role
    dtype = views[edit.anchor].evidence.weight(views[edit.anchor].linears[role]).dtype
    if edit.anchor in edit.layers:
        base = weighted_mean(*zip(*((view.weight(role), view.gram(role)) for view in views.values()), strict=True))
    else:
        base = views[edit.anchor].weight(role)
    base = base.to(dtype)
    made, lost, whole = {}, 0.0, 0.0
    for layer in edit.layers:
        weight, gram = views[layer].weight(role), views[layer].gram(role)
        delta = weight.double() - base.double()
        if init == "random":
            left, right, error = *_untrained(delta, edit.rank, f"{edit.id}.{layer}"), 1.0
        else:
            left, right, error, _ = low_rank(delta, gram, edit.rank)
        lost += error * energy(delta, gram)
        whole += energy(weight, gram)
        made[layer] = left, right
    return base, made, lost / whole if whole else 0.0


def _untrained(delta: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """A of variance 1/d_in, drawn for this name, and B = 0."""
    d_in, d_out = delta.shape
    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    left = torch.randn(d_in, rank, generator=draw, dtype=delta.dtype) * d_in**-0.5
    return left.to(delta.device), delta.new_zeros(rank, d_out)
