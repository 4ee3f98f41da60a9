"""Carry out the deltas of a plan: sub-layer by sub-layer, each together with its anchor."""

import zlib

import torch
from torch import Tensor

from layershare.errors import LayershareError
from layershare.methods.aligned import SubLayer, as_it_is
from layershare.methods.delta import DeltaLlm
from layershare.methods.evidence import Evidence
from layershare.methods.method import Method
from layershare.model.arch import Part, part_of
from layershare.plan.edits import Delta
from layershare.progress import Progress, no_progress
from layershare.solve.apply import Factored, named_tensors, require_fitting
from layershare.solve.linalg import energy, low_rank, weighted_mean

Place = tuple[Part, int, tuple[int, ...]]
"""The part, the anchor and the other layers of edits that belong together."""


def solve_deltas(factored: Factored, method: Method, evidence: Evidence, progress: Progress = no_progress) -> None:
    """Solve every sub-layer with deltas that is not solved yet, one at a time, each stored as soon as it is done.

    Raises `LayershareError` if a weight or a factor is not finite, naming the place, and if the method has no deltas.
    """
    places: dict[Place, list[Delta]] = {}
    for edit in factored.anchored:
        places.setdefault((part_of(edit.role), edit.anchor, edit.layers), []).append(edit)
    if places and not isinstance(method, DeltaLlm):
        raise LayershareError("The plan has deltas, which its method cannot make; set its method to 'delta'.")
    for done, (place, edits) in enumerate(places.items()):
        progress(done, len(places))
        part, anchor, layers = place
        unit = f"{part}.{anchor:02d}+{'-'.join(f'{layer:02d}' for layer in layers)}"
        if not factored.has_delta(unit):
            assert isinstance(method, DeltaLlm)
            factored.write_delta(unit, *_solved(place, edits, method, evidence))
    if places:
        progress(len(places), len(places))


def _solved(
    place: Place, edits: list[Delta], method: DeltaLlm, evidence: Evidence
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """The tensors by name, and of each edit the error Σ‖Xₜ(Wₜ − W − AₜBₜ)‖² / Σ‖XₜWₜ‖²."""
    part, anchor, layers = place
    users = (anchor, *(layer for layer in layers if layer != anchor))
    if {edit.role for edit in edits} == {linear.role for linear in evidence.spec.part(anchor, part)}:
        views = method.views(evidence, part, anchor, users[1:])
    else:  # a plan by hand: weights that stay as they are would not fit to a norm or units that are changed
        views = [as_it_is(evidence, layer, part, weighted=method.weighted) for layer in users]
    tensors: dict[str, Tensor] = {}
    for view in views:
        tensors |= view.others()
    facts = {}
    for edit in edits:
        base, made, error = _deltas(edit, dict(zip(users, views, strict=True)), method.init)
        own = {evidence.spec.linear(edit.role, layer).name: pair for layer, pair in made.items()}
        tensors |= named_tensors(evidence.spec, edit, base, own, base.dtype)
        facts[edit.id] = {"error": error}
    require_fitting(tensors)
    return tensors, facts


def _deltas(
    edit: Delta, views: dict[int, SubLayer], init: str
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
