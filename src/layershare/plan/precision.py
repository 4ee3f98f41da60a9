"""What matrices lose as integers, whole or as two factors: measured at some ranks and bits, and told of the others.

A matrix itself is quantized with every number of bits that is offered. Of its factors, a pair is at three ranks, with
`PROBED` bits each: the one that meets the input first, then, fitted to that, the second one. Between these ranks
losses are straight lines, and with other bits they go as the square of the distance between neighbouring numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layershare.formulas.linalg import Factors, pivot_factors
from layershare.formulas.quantize import Numbers, as_stored, fitted_to
from layershare.model.arch import Linear
from layershare.model.composition import Side, Storage
from layershare.model.layers import unpivoted
from layershare.plan.ranks import Group

PROBED = 3
PARTS = (0.25, 0.5, 0.75)
"""The ranks at which factors are quantized, as parts of the full one."""


@dataclass(frozen=True)
class Noise:
    """By what integers raise a matrix's loss (float64): of `bits` the matrix itself, at `ranks` each of two factors."""

    bits: tuple[int, ...]
    dense: Tensor
    ranks: tuple[int, ...]
    factors: Tensor
    """2 × ranks: of the one that meets the input first, and of the second one; with `PROBED` bits."""

    def of_dense(self, bits: int) -> float:
        """What the matrix itself loses."""
        return float(self.dense[self.bits.index(bits)])

    def of_factors(self, basis: int, own: int, ranks: Tensor, side: Side) -> Tensor:
        """What factors of these ranks lose beside: the basis, which lies on a side, of its bits, the rest of others."""
        bits = (basis, own) if side == "input" else (own, basis)
        scales = [(Numbers(each).step / Numbers(PROBED).step) ** 2 for each in bits]
        first, second = (scale * _between(self.ranks, x, ranks) for scale, x in zip(scales, self.factors, strict=True))
        return first + second


def probed_ranks(linear: Linear) -> tuple[int, ...]:
    """The ranks at which a matrix's factors are quantized."""
    full = min(linear.d_in, linear.d_out)
    return tuple(dict.fromkeys(max(1, int(part * full)) for part in PARTS))


def dense_noise(weight: Tensor, gram: Tensor, bits: int, loss: Callable[[Tensor], float]) -> Tensor:
    """What a weight (d_in × d_out) loses with so many bits, as a number in float64.

    `gram`: of its inputs; `loss`: of an error of the weight.
    """
    error = weight.double() - as_stored(weight.T, gram, Numbers(bits), weight.dtype).T
    return torch.tensor(loss(error), dtype=torch.float64)


def factors_noise(
    weight: Tensor, gram: Tensor, factors: Factors, side: Side, pivot: bool, loss: Callable[[Tensor], float]
) -> Tensor:
    """What two factors of a weight lose beside with `PROBED` bits: the one that meets the input, and the second one."""
    return torch.tensor([*_added(weight, gram, factors, side, pivot, loss)], dtype=torch.float64)


def _added(
    weight: Tensor, gram: Tensor, factors: Factors, side: Side, pivot: bool, loss: Callable[[Tensor], float]
) -> Iterator[float]:
    """What quantizing the first of two factors adds to their loss, and then what the second one adds."""
    made = pivot_factors(factors, side) if pivot else factors
    pair = (made.basis.T, made.coefs[0].T) if side == "input" else (made.coefs[0].T, made.basis.T)
    first, second = (each.double() for each in pair)
    order = made.order

    def whole(factor: Tensor, of: Side) -> Tensor:
        return factor if order is None or of != side else unpivoted(factor, order, side)

    def lost(first: Tensor, second: Tensor) -> float:
        return loss(weight.double() - (whole(second, "output") @ whole(first, "input")).T)

    met = torch.arange(len(gram)) if order is None or side == "output" else order[len(first) :]
    rounded = as_stored(first, gram[met][:, met], Numbers(PROBED), weight.dtype)
    before = lost(first, second)
    if side == "input":
        second = fitted_to(whole(first, "input"), second, whole(rounded, "input"), gram)
    between = lost(rounded, second)
    inner = whole(rounded, "input")
    after = lost(rounded, as_stored(second, inner @ gram.double() @ inner.T, Numbers(PROBED), weight.dtype))
    yield max(between - before, 0.0)
    yield max(after - between, 0.0)


def _between(places: Sequence[int], values: Tensor, at: Tensor) -> Tensor:
    """Values at some places as straight lines between them; before the first one from 0, after the last one flat."""
    x = torch.tensor([0, *places], dtype=torch.float64)
    y = torch.cat([values.new_zeros(1), values])
    right = torch.searchsorted(x, at.double()).clamp(1, len(x) - 1)
    part = ((at - x[right - 1]) / (x[right] - x[right - 1])).clamp(max=1)
    return y[right - 1] + part * (y[right] - y[right - 1])


def offered(bits: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The bits of a basis and of the rest that go together: the same, or the next higher ones for the basis."""
    rising = sorted(bits)
    for i, own in enumerate(rising):
        yield from ((basis, own) for basis in rising[i : i + 2])


def bytes_of_factors(
    linear: Linear, group: Group, basis: Storage, own: Storage, ranks: Tensor, itemsize: int
) -> Tensor:
    """The bytes of a matrix's factors of these ranks, scales of `itemsize` bytes among them."""
    inward = group.side == "input"
    first, second = (basis, own) if inward else (own, basis)
    columns = linear.d_in - ranks * (group.pivot and inward)
    rows = linear.d_out - ranks * (group.pivot and not inward)
    order = 4 * (linear.d_in if inward else linear.d_out) if group.pivot else 0
    return (first.bytes(ranks, columns, itemsize) + second.bytes(rows, ranks, itemsize) + order).double()
