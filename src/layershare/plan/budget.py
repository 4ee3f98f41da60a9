"""Exact accounting: parameters, bytes and multiplications of a model under edits, and what `keep` allows."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor, prod
from typing import get_args

from layershare.errors import LayershareError, short, unknown
from layershare.model.arch import Spec
from layershare.model.checkpoint import file_bytes
from layershare.plan.edits import Edit, dropped_parts, kept_layers, quantized, sharing, sliced_width
from layershare.plan.layout import checkpoint_tensors, composed_tensors, compositions, origins
from layershare.plan.slices import target_names
from layershare.values import Counted

_DIAL = r"((?:[0-9]{1,20}\.?[0-9]{0,20}|\.[0-9]{1,20})(?:[eE][-+]?[0-9]{1,3})?)\s*([A-Za-z]*)"
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_NAMES = {
    "all": "parameters",
    "targets": "parameters in its targets",
    "multiplications": "multiplications per token",
}


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

    def counted(self, of: Counted) -> int:
        """What `keep` counts."""
        return self.all.multiplications if of == "multiplications" else getattr(self, of).parameters


@dataclass(frozen=True)
class Budget:
    """What may be kept: of the targets a fraction and the count that is never exceeded, and what the user counts `of`.

    With `of="all"` the whole model may have `parameters` plus everything that is not a target, and with
    `of="multiplications"` it may multiply as often, plus the output head.
    """

    fraction: Fraction
    parameters: int
    of: Counted = "targets"


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
    match = re.fullmatch(_DIAL, str(keep).strip())
    unit = match[2].upper() if match else ""
    if match is None or (unit not in _COUNTS and unit not in _BYTES):
        raise LayershareError(
            f"keep={short(str(keep))} is not understood; give a fraction (0.8), parameters (5.4B) or a size (11GB)."
        )
    number = Fraction(match[1])
    if unit in _BYTES:
        return Keep(bytes=floor(number * _BYTES[unit]))
    if unit:
        return Keep(parameters=floor(number * _COUNTS[unit]))
    if not 0 < number <= 1:
        raise LayershareError(f"keep={keep} must be above 0 and at most 1; write parameters as 5.4B and sizes as 11GB.")
    return Keep(fraction=number)


def measure(spec: Spec, edits: Sequence[Edit]) -> Sizes:
    """Exact sizes of the model after the edits (none: of the dense model)."""
    if sliced_width(edits):
        return _measure_sliced(spec, edits)
    composed = {**sharing(edits), **quantized(edits)}
    kept, dropped = set(kept_layers(spec.n_layers, edits)), set(dropped_parts(edits))
    stays = [x for x in spec.linears if x.layer in kept and (x.layer, x.part) not in dropped]
    dense = [x for x in stays if (x.role, x.layer) not in composed]
    sources = [source[0][1] for source in origins(spec, edits).values()]
    rest = sum(prod(spec.tensors[name][0]) for name in sources if name not in spec.buffers)
    rest -= sum(linear.parameters for linear in dense)
    parameters = multiplications = data = 0
    for each in compositions(spec, edits):
        parameters += each.parameters
        multiplications += each.multiplications
        data += sum(prod(shape) * dtype.itemsize for shape, dtype in composed_tensors(spec, each).values())
    for linear in dense:
        parameters += linear.parameters
        multiplications += linear.parameters
        data += linear.parameters * spec.tensors[spec.weight_name(linear)][1].itemsize
    return Sizes(
        all=Size(
            parameters=rest + parameters,
            bytes=file_bytes(checkpoint_tensors(spec, edits)),
            multiplications=multiplications + spec.head_multiplications,
        ),
        targets=Size(parameters, data, multiplications),
    )


def _measure_sliced(spec: Spec, edits: Sequence[Edit]) -> Sizes:
    """Sizes of a sliced model; shortcut matrices count as targets, for they stand in the blocks."""
    tensors = checkpoint_tensors(spec, edits)
    counts = {name: prod(shape) for name, (shape, _) in tensors.items() if name not in spec.buffers}
    targets = target_names(spec)
    parameters = sum(counts[name] for name in targets)
    return Sizes(
        all=Size(
            parameters=sum(counts.values()),
            bytes=file_bytes(tensors),
            multiplications=parameters + counts[f"{spec.sliceable().head}.weight"],
        ),
        targets=Size(parameters, sum(counts[name] * tensors[name][1].itemsize for name in targets), parameters),
    )


def target_parameters(spec: Spec) -> int:
    """Parameters of the targets, which are all linears of the blocks that have a role."""
    return sum(linear.parameters for linear in spec.linears)


def allows(budget: Budget, spec: Spec, edits: Sequence[Edit]) -> bool:
    """Whether the model after the edits is within the budget, in what the user counts."""
    return excess(budget, spec, measure(spec, edits)) <= 0


def excess(budget: Budget, spec: Spec, after: Sizes) -> int:
    """By how much a model of this size is over the budget, in what the user counts."""
    return after.counted(budget.of) - budget.parameters - _beside_targets(spec, budget.of)


def _beside_targets(spec: Spec, of: Counted) -> int:
    """What is counted of a dense model beside the parameters of its targets."""
    return {
        "all": spec.parameters - target_parameters(spec),
        "targets": 0,
        "multiplications": spec.head_multiplications,
    }[of]


def allowed(spec: Spec, keep: Keep, of: str, stored: Sequence[Edit] = ()) -> Budget:
    """The targets' budget under `keep`, counted of all parameters, of the targets alone, or of multiplications.

    A size in bytes is that of a model whose matrices are `stored` so.

    Raises `LayershareError` if more than the model is asked for, or less than what cannot be compressed, for bytes of
    multiplications, and for other words than these three.
    """
    if of != "all" and of != "targets" and of != "multiplications":  # so that its type is known
        raise unknown("of", of, get_args(Counted))
    targets, rest = target_parameters(spec), _beside_targets(spec, of)
    total = targets + rest
    if keep.fraction is not None:
        wanted = keep.fraction * total
    elif keep.parameters is not None:
        wanted = Fraction(keep.parameters)
    else:
        assert keep.bytes is not None
        if of == "multiplications":
            raise LayershareError("Multiplications have no bytes; give keep as a fraction (0.5) or a count (5.4B).")
        sizes = measure(spec, stored)
        size = sizes.all.bytes if of == "all" else sizes.targets.bytes
        itemsize = Fraction(sizes.targets.bytes, targets)
        wanted = total - (size - keep.bytes) / itemsize
    if wanted > total:
        raise LayershareError(
            f"The model has {total:,} {_NAMES[of]}, less than keep asks for: there is nothing to compress."
        )
    if wanted <= rest and of == "multiplications":
        raise LayershareError(f"The output head alone takes {rest:,} multiplications per token; keep more.")
    if wanted <= rest:
        raise LayershareError(
            "keep is smaller than what cannot be compressed: embeddings, norms, biases and file header take "
            f"{rest / spec.parameters:.1%} of the model ({rest:,} parameters); keep more, or count of='targets'."
        )
    return Budget((wanted - rest) / targets, floor(wanted - rest), of)
