"""The tensors of the compressed checkpoint: their names and shapes, and the dense tensors that they come from."""

from collections.abc import Sequence

import torch

from layershare.model.arch import Linear, Spec
from layershare.model.checkpoint import Tensors
from layershare.plan.edits import Delta, Edit, Merge, Share, dropped_parts, kept_layers, sharing, sliced_width
from layershare.plan.slices import guard_of_slices, sliced_tensors, treated

Sources = tuple[tuple[float, str], ...]
"""A tensor as Σ cⱼ Tⱼ of dense ones, by their names."""


def origins(spec: Spec, edits: Sequence[Edit]) -> dict[str, Sources]:
    """New name -> what it is made from, for every tensor that stays dense. Blocks are numbered anew."""
    gone = {spec.weight_name(spec.linear(role, layer)) for role, layer in sharing(edits)}
    for layer, part in dropped_parts(edits):
        gone.update(spec.part_tensors(layer, part))
    if sliced_width(edits):
        gone |= treated(spec)
    merges = {edit.into: edit for edit in edits if isinstance(edit, Merge)}
    number = {old: new for new, old in enumerate(kept_layers(spec.n_layers, edits))}
    found: dict[str, Sources] = {}
    for name in spec.tensors:
        layer = spec.layer_of(name)
        if name in gone or (layer is not None and layer not in number):
            continue
        if layer is None:
            found[name] = ((1.0, name),)
        elif layer in merges:
            edit = merges[layer]
            pairs = zip(edit.coefficients, edit.layers, strict=True)
            found[spec.renumbered(name, number[layer])] = tuple((c, spec.renumbered(name, j)) for c, j in pairs)
        else:
            found[spec.renumbered(name, number[layer])] = ((1.0, name),)
    return found


def checkpoint_tensors(spec: Spec, edits: Sequence[Edit]) -> Tensors:
    """Shape and dtype of every tensor of the compressed checkpoint, the zero-size guard tensor included."""
    tensors = {name: spec.tensors[sources[0][1]] for name, sources in origins(spec, edits).items()}
    if width := sliced_width(edits):
        tensors |= sliced_tensors(spec, width)
    for edit in edits:
        if isinstance(edit, Share):
            tensors |= share_tensors(spec, edit)
        elif isinstance(edit, Delta):
            tensors |= delta_tensors(spec, edit)
    if guard := guard_of(spec, edits):
        tensors[guard] = ((0,), torch.uint8)
    return tensors


def share_tensors(spec: Spec, edit: Share) -> Tensors:
    """The tensors of a group: the basis, at its first layer, then each layer's coefficients."""
    tensors: Tensors = {}
    for position, layer in enumerate(edit.layers):
        linear = spec.linear(edit.role, layer)
        name, dtype = _place(spec, linear)
        basis, coef = (edit.rank, linear.d_in), (linear.d_out, edit.rank)
        if edit.side == "output":
            basis, coef = coef, basis
        if position == 0:
            tensors[f"{name}.basis.weight"] = (basis, dtype)
        tensors[f"{name}.coef.weight"] = (coef, dtype)
    return tensors


def delta_tensors(spec: Spec, edit: Delta) -> Tensors:
    """The tensors of a `Delta`: the shared weight Wᵀ, at the anchor, then Aₜᵀ (down) and Bₜᵀ (up) of each layer t."""
    anchor = spec.linear(edit.role, edit.anchor)
    name, dtype = _place(spec, anchor)
    tensors: Tensors = {f"{name}.base.weight": ((anchor.d_out, anchor.d_in), dtype)}
    for layer in edit.layers:
        linear = spec.linear(edit.role, layer)
        name, dtype = _place(spec, linear)
        tensors[f"{name}.down.weight"] = ((edit.rank, linear.d_in), dtype)
        tensors[f"{name}.up.weight"] = ((linear.d_out, edit.rank), dtype)
    return tensors


def _place(spec: Spec, linear: Linear) -> tuple[str, torch.dtype]:
    """The full name of a linear, and the dtype of its weight."""
    dense = spec.weight_name(linear)
    return dense.removesuffix(".weight"), spec.tensors[dense][1]


def guard_of(spec: Spec, edits: Sequence[Edit]) -> str | None:
    """The name of the guard tensor: the first dense weight that only our loader knows to be gone, if there is one."""
    for edit in edits:
        if isinstance(edit, Share):
            return spec.weight_name(spec.linear(edit.role, edit.layers[0]))
    for edit in edits:
        if isinstance(edit, Delta):
            return spec.weight_name(spec.linear(edit.role, edit.anchor))
    for layer, part in dropped_parts(edits):
        return spec.weight_name(spec.part(layer, part)[0])
    if sliced_width(edits):
        return guard_of_slices(spec)
    return None
