"""Exact accounting: parameters, bytes and multiplications of a model under edits, and what `keep` allows."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

import torch

from layershare.errors import LayershareError
from layershare.model.arch import Spec
from layershare.model.checkpoint import Tensors, file_bytes
from layershare.plan.edits import Share

_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Size:
    """Parameters; bytes on disk (for a whole model those of its checkpoint); multiplications per token."""

    parameters: int
    bytes: int
    multiplications: int


@dataclass(frozen=True)
class Sizes:
    """The size of the whole model, and of the compressed linears (the targets) alone, as the papers count."""

    all: Size
    targets: Size


@dataclass(frozen=True)
class Budget:
    """What the targets may keep: a fraction of their parameters, and the count that is never exceeded."""

    fraction: Fraction
    parameters: int


@dataclass(frozen=True)
class Keep:
    """The one dial, parsed: exactly one of the three is set."""

    fraction: Fraction | None = None
    parameters: int | None = None
    bytes: int | None = None


def parse_keep(keep: float | str) -> Keep:
    """Parse `0.8` (a fraction), `5.4B` (parameters, with K, M, B or T) or `11GB` (bytes, also GiB and so on).

    Raises `LayershareError` for anything else, and for fractions outside ]0, 1].
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)", str(keep).strip())
    unit = match[2].upper() if match else ""
    if match is None or (unit not in _COUNTS and unit not in _BYTES):
        raise LayershareError(
            f"keep={keep} is not understood; give a fraction (0.8), parameters (5.4B) or a size (11GB)."
        )
    number = Fraction(match[1])
    if unit in _BYTES:
        return Keep(bytes=floor(number * _BYTES[unit]))
    if unit:
        return Keep(parameters=floor(number * _COUNTS[unit]))
    if not 0 < number <= 1:
        raise LayershareError(f"keep={keep} must be above 0 and at most 1; write parameters as 5.4B and sizes as 11GB.")
    return Keep(fraction=number)


def share_parameters(spec: Spec, edit: Share) -> int:
    """Parameters of one group: k(d_in + n·d_out) with a shared input side, k(n·d_in + d_out) with an output side."""
    return edit.rank * unit_cost(spec, edit.role, edit.layers, edit.side)


def unit_cost(spec: Spec, role: str, layers: Sequence[int], side: str) -> int:
    """Parameters of one unit of rank in a group."""
    linear = spec.linear(role, layers[0])
    shared, private = (linear.d_in, linear.d_out) if side == "input" else (linear.d_out, linear.d_in)
    return shared + len(layers) * private


def checkpoint_tensors(spec: Spec, edits: Iterable[Share]) -> Tensors:
    """Shape and dtype of every tensor of the compressed checkpoint, the zero-size guard tensor included."""
    tensors = dict(spec.tensors)
    guard = None
    for edit in edits:
        for position, layer in enumerate(edit.layers):
            linear = spec.linear(edit.role, layer)
            dense = spec.weight_name(linear)
            name, dtype = dense.removesuffix(".weight"), tensors.pop(dense)[1]
            guard = guard or dense
            basis, coef = (edit.rank, linear.d_in), (linear.d_out, edit.rank)
            if edit.side == "output":
                basis, coef = coef, basis
            if position == 0:
                tensors[f"{name}.basis.weight"] = (basis, dtype)
            tensors[f"{name}.coef.weight"] = (coef, dtype)
    if guard:
        tensors[guard] = ((0,), torch.uint8)
    return tensors


def measure(spec: Spec, edits: Iterable[Share]) -> Sizes:
    """Exact sizes of the model after the edits (none: of the dense model)."""
    edits = tuple(edits)
    dense = {(x.role, x.layer): x for x in spec.linears}
    parameters = multiplications = data = 0
    for edit in edits:
        itemsize = spec.tensors[spec.weight_name(spec.linear(edit.role, edit.layers[0]))][1].itemsize
        for layer in edit.layers:
            linear = dense.pop((edit.role, layer))
            multiplications += edit.rank * (linear.d_in + linear.d_out)
        count = share_parameters(spec, edit)
        parameters += count
        data += count * itemsize
    for linear in dense.values():
        parameters += linear.parameters
        multiplications += linear.parameters
        data += linear.parameters * spec.tensors[spec.weight_name(linear)][1].itemsize
    rest = spec.parameters - target_parameters(spec)
    return Sizes(
        all=Size(
            parameters=rest + parameters,
            bytes=file_bytes(checkpoint_tensors(spec, edits)),
            multiplications=multiplications + spec.head_multiplications,
        ),
        targets=Size(parameters, data, multiplications),
    )


def target_parameters(spec: Spec) -> int:
    """Parameters of the targets, which are all linears of the blocks that have a role."""
    return sum(linear.parameters for linear in spec.linears)


def allowed(spec: Spec, keep: Keep, of: str) -> Budget:
    """The targets' budget under `keep`, counted of all parameters (`of="all"`) or of the targets alone.

    Raises `LayershareError` if more than the model is asked for, or less than what cannot be compressed.
    """
    targets = target_parameters(spec)
    total = spec.parameters if of == "all" else targets
    rest = total - targets
    if keep.fraction is not None:
        wanted = keep.fraction * total
    elif keep.parameters is not None:
        wanted = Fraction(keep.parameters)
    else:
        assert keep.bytes is not None
        sizes = measure(spec, ())
        size = sizes.all.bytes if of == "all" else sizes.targets.bytes
        itemsize = Fraction(sizes.targets.bytes, targets)
        wanted = total - (size - keep.bytes) / itemsize
    if wanted > total:
        raise LayershareError(
            f"The model has {total:,} parameters{'' if of == 'all' else ' in its targets'}, less than keep asks for: "
            "there is nothing to compress."
        )
    if wanted <= rest:
        raise LayershareError(
            "keep is smaller than what cannot be compressed: embeddings, norms, biases and file header take "
            f"{rest / spec.parameters:.1%} of the model ({rest:,} parameters); keep more, or count of='targets'."
        )
    return Budget(fraction=(wanted - rest) / targets, parameters=floor(wanted - rest))
