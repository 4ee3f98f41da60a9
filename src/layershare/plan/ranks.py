"""Groups of layers and their ranks: the same ratio everywhere, as most papers have it, and the spending of a budget."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from typing import Any

from layershare.errors import LayershareError
from layershare.model.arch import WRITERS, Linear, Spec
from layershare.model.composition import Composition, Side, shared
from layershare.plan.budget import Budget
from layershare.plan.edits import Place, Share, composition, places

TOLERANCE = Fraction(1, 200)
"""A plan lands within this fraction under its budget."""


@dataclass(frozen=True)
class Group:
    """Linears that will share a basis, before a rank is chosen."""

    places: tuple[Place, ...]
    side: Side
    pivot: bool = False

    def share(self, rank: int) -> Share:
        """The edit of this rank."""
        return Share(self.places, rank, self.side, pivot=self.pivot)


@dataclass(frozen=True)
class Cost:
    """Parameters of rank k: ωk (`linear`), less k² if the basis is pivoted; never more than the `whole` matrices."""

    linear: int
    whole: int
    pivot: bool = False

    def size(self, rank: int | Fraction | float) -> Any:
        """Parameters of a rank. Where factors are not smaller than the matrices, these are left as they are."""
        if not self.pivot:
            return min(rank * self.linear, self.whole)
        return min(rank * self.linear - rank**2, self.whole) if 2 * rank < self.linear else self.whole

    def rank(self, parameters: Fraction | float) -> Any:
        """The exact rank, no whole number, that takes so many parameters, which are no more than the `whole`."""
        if not self.pivot:
            return parameters / self.linear
        root = math.sqrt(max(self.linear**2 - 4 * parameters, 0))
        return round((self.linear - root) / 2, 9)  # to whole ranks where they are meant


def uniform_rank(d_shared: int, d_private: int, n: int, keep: Fraction | float) -> int:
    """Rank of a group of n layers at keep fraction x: k = ⌊x·d₁·d₂·n / (d₁ + n·d₂)⌋ (Basis Sharing, App. A.1).

    `d_shared` (d₁) is the width of the shared side, `d_private` (d₂) that of the private one.
    """
    return int(Fraction(keep) * d_shared * d_private * n / (d_shared + n * d_private))


def consecutive(linears: Sequence[Linear], size: int) -> list[tuple[int, ...]]:
    """Layers in groups of `size`, in order from the first; a remainder makes a smaller group of its own.

    Only layers of equal shape share a group: where the shape changes, a new group begins.
    """
    groups = []
    for _, run in groupby(linears, key=lambda linear: (linear.d_in, linear.d_out)):
        layers = [linear.layer for linear in run]
        groups += [tuple(layers[start : start + size]) for start in range(0, len(layers), size)]
    return groups


def natural_side(role: str) -> Side:
    """The side of a role that lies in the residual stream."""
    return "output" if role in WRITERS else "input"


def private_groups(linears: Iterable[Linear], pivot: bool = False) -> list[Group]:
    """Every linear in a group of its own."""
    return [Group(places(linear.role, [linear.layer]), natural_side(linear.role), pivot) for linear in linears]


def group_cost(spec: Spec, group: Group) -> Cost:
    """Parameters of a group by rank."""
    return _cost(composition(spec, group.share(1)), group.pivot)


def matrix_cost(linear: Linear, pivot: bool = False) -> Cost:
    """The same of a matrix for itself."""
    return _cost(shared([linear.member], 1, natural_side(linear.role), pivot=pivot), pivot)


def _cost(one: Composition, pivot: bool) -> Cost:
    """The cost by rank of what is `one` of rank 1."""
    return Cost(one.parameters + pivot, sum(member.d_in * member.d_out for member in one.members), pivot)


def in_order(spec: Spec, shares: Iterable[Share]) -> tuple[Share, ...]:
    """Shares by their first layer, then in the order in which data flows through a block."""
    order = {role: position for position, role in enumerate(spec.roles)}
    return tuple(sorted(shares, key=lambda share: (share.layers[0], order[share.roles[0]])))


def uniform(spec: Spec, groups: Sequence[Group], budget: Budget, multiple: int = 1) -> tuple[Share, ...]:
    """Give every group the published rank for its own size; the groups cover all targets. Raises as `allocate`."""
    exact = [cost.rank(budget.fraction * cost.whole) for cost in (group_cost(spec, group) for group in groups)]
    return allocate(spec, groups, exact, budget.parameters, multiple=multiple)


def allocate(
    spec: Spec,
    groups: Sequence[Group],
    exact: Sequence[Fraction | float],
    parameters: int,
    gains: Sequence[float] | None = None,
    multiple: int = 1,
) -> tuple[Share, ...]:
    """Whole ranks for groups from exact ones that stay within `parameters`, using them up to `TOLERANCE` where it can.

    Every rank is rounded down to a multiple of `multiple`, and a group stays dense where its factors would not be
    smaller than its matrices. The ranks stand as they are when they use `parameters` up to `TOLERANCE`, as they do in
    models of real size. Otherwise, in small models, groups get one step more, in turn, while there are parameters left:
    first those that gain most, by `gains` or by default by what rounding took. Raises `LayershareError` if a group
    would get no rank at all.
    """
    costs = [group_cost(spec, group) for group in groups]
    ranks = [int(rank) // multiple * multiple for rank in exact]
    sizes = [
        cost.whole if cost.size(rank) >= cost.whole else cost.size(rounded)
        for rank, rounded, cost in zip(exact, ranks, costs, strict=True)
    ]
    left = parameters - sum(sizes)
    if left > TOLERANCE * parameters:
        lost = [rank - whole for rank, whole in zip(exact, ranks, strict=True)] if gains is None else gains
        spend(ranks, sizes, costs, left, sorted(range(len(groups)), key=lambda i: (-lost[i], i)), multiple)
    shares = []
    for group, rank, size, cost in zip(groups, ranks, sizes, costs, strict=True):
        if rank < 1:
            share = group.share(rank)
            raise LayershareError(
                f"keep leaves no rank for {' and '.join(share.roles)} of layers {share.layers[0]}–{share.layers[-1]}; "
                f"keep more{'' if multiple == 1 else ', or set a smaller multiple'}."
            )
        if size < cost.whole:
            shares.append(group.share(rank))
    return in_order(spec, shares)


def spend(
    ranks: list[int], sizes: list[int], costs: Sequence[Cost], left: int, turns: Sequence[int], by: int = 1
) -> None:
    """Raise ranks in place `by` so much each, in `turns`, round after round, as long as any fits into `left`."""
    fits = True
    while fits:
        fits = False
        for i in turns:
            step = costs[i].size(ranks[i] + by) - sizes[i]
            if 0 < step <= left:
                ranks[i] += by
                sizes[i] += step
                left -= step
                fits = True
