"""The tensors of the compressed checkpoint: their names and shapes, and the dense tensors that they come from."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layershare.errors import NotFinite
from layershare.model.arch import Spec
from layershare.model.checkpoint import Tensors
from layershare.model.composition import Composition, alone
from layershare.model.sliced import Sliced
from layershare.model.swap import Dropped, first_gone
from layershare.plan.edits import (
    Delta,
    Edit,
    Merge,
    Share,
    composition,
    dropped_parts,
    kept_layers,
    quantized,
    sharing,
    sliced_width,
)
from layershare.plan.slices import sliced_tensors, treated

Sources = tuple[tuple[float, str], ...]
"""A tensor as Σ cⱼ Tⱼ of dense ones, by their names."""


def origins(spec: Spec, edits: Sequence[Edit]) -> dict[str, Sources]:
    """New name -> what it is made from, for every tensor that stays dense. Blocks are numbered anew."""
    gone = {spec.weight_name(spec.linear(*place)) for place in {**sharing(edits), **quantized(edits)}}
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
    for each in compositions(spec, edits):
        tensors |= composed_tensors(spec, each)
    if gone := first_gone(**listed(spec, edits)):
        tensors[f"{spec.base_prefix}{gone}"] = ((0,), torch.uint8)
    return tensors


def compositions(spec: Spec, edits: Sequence[Edit]) -> list[Composition]:
    """What stands in the place of the linears that edits factor, share or quantize, edit after edit."""
    stored, found = quantized(edits), []
    for edit in edits:
        if isinstance(edit, Share | Delta):
            made, how = composition(spec, edit), stored.get(edit.places[0])
            found.append(made if how is None else how.of(made))
    dense = [place for place in stored if place not in sharing(edits)]
    return found + [stored[place].of(alone(spec.by_place[place].member)) for place in dense]


def composed_tensors(spec: Spec, each: Composition) -> Tensors:
    """The tensors of a composition, by full names, in the dtypes of the dense weights that they stand for."""
    tensors: Tensors = {}
    for member, factor in each.stored():
        name = f"{spec.base_prefix}{member.name}"
        dense = spec.tensors[f"{name}.weight"][1]
        for key, (shape, dtype) in factor.tensors(member).items():
            tensors[f"{name}.{key}"] = (shape, getattr(torch, dtype) if dtype else dense)
    return tensors


def listed(spec: Spec, edits: Sequence[Edit]) -> dict[str, Any]:
    """What `config.json` lists of a plan: its compositions, what is dropped, how the model is sliced."""
    width = sliced_width(edits)
    return {
        "compositions": compositions(spec, edits),
        "dropped": [
            Dropped(part, tuple(linear.name for linear in spec.part(layer, part)))
            for layer, part in dropped_parts(edits)
        ],
        "slice": None if width is None else Sliced(width, spec.sliceable()),
    }


def named_tensors(
    spec: Spec,
    edit: Share | Delta,
    shared: Tensor,
    own: Mapping[str, Iterable[Tensor]],
    dtype: torch.dtype,
    order: Tensor | None = None,
) -> dict[str, Tensor]:
    """The tensors of an edit as layers hold them, by full name, from its matrices in row convention.

    `own`: linear's name -> the factors that are its own, the one that meets the input first. `order`: of the shared
    one, if it is pivoted. Raises `NotFinite` if one does not fit the dtype.
    """
    composed = composition(spec, edit)
    rest = {name: iter(matrices) for name, matrices in own.items()}
    matrices: list[Tensor] = []
    for member, factor in composed.stored():
        matrices.append(shared if factor.home else next(rest[member.name]))
        matrices += [order] if factor.pivots and order is not None else []
    found = zip(composed_tensors(spec, composed), matrices, strict=True)
    tensors = {name: each.T.to(dtype) if each.is_floating_point() else each.int() for name, each in found}
    require_fitting(tensors)
    return tensors


def require_fitting(tensors: Mapping[str, Tensor]) -> None:
    """Raise `NotFinite` for a made tensor that its dtype cannot hold."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NotFinite(f"'{name}' does not fit {tensor.dtype} when it is made; use a wider dtype.")
