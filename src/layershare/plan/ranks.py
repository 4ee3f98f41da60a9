"""The same ratio everywhere: the ranks that the papers give to groups, and the exact spending of a budget."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

from layershare.errors import LayershareError
from layershare.model.arch import WRITERS, Linear, Spec
from layershare.plan.budget import Budget, unit_cost
from layershare.plan.edits import Share, Side

TOLERANCE = Fraction(1, 200)
"""A plan lands within this fraction under its budget."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers that will share a basis for a role, before a rank is chosen."""

    role: str
    layers: tuple[int, ...]
    side: Side


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


def private_groups(spec: Spec) -> list[LayerGroup]:
    """Every target in a group of its own."""
    return [LayerGroup(linear.role, (linear.layer,), natural_side(linear.role)) for linear in spec.linears]


def in_order(spec: Spec, shares: Iterable[Share]) -> tuple[Share, ...]:
    """Shares by their first layer, then in the order in which data flows through a block."""
    order = {role: position for position, role in enumerate(spec.roles)}
    return tuple(sorted(shares, key=lambda share: (share.layers[0], order[share.role])))


def uniform(spec: Spec, groups: Sequence[LayerGroup], budget: Budget) -> tuple[Share, ...]:
    """Give every group the published rank for its own size; spend on single ranks what rounding down left over.

    The groups cover all targets. The published ranks stand as they are when they use the budget up to `TOLERANCE`, as
    they do in models of real size. Otherwise, in small models, the groups that lost most by rounding get one rank more
    as long as the budget is not exceeded. Raises `LayershareError` if a group would get no rank at all.
    """
    if budget.fraction == 1:
        return ()
    exact = [
        budget.fraction * len(group.layers) * spec.linear(group.role, group.layers[0]).parameters / cost
        for group, cost in zip(groups, _costs(spec, groups), strict=True)
    ]
    return rounded(spec, groups, exact, budget.parameters)


def rounded(
    spec: Spec, groups: Sequence[LayerGroup], exact: Sequence[Fraction | float], parameters: int
) -> tuple[Share, ...]:
    """Shares of the groups with their exact ranks rounded down, so that they have at most this many `parameters`.

    Where rounding leaves more than `TOLERANCE` of these, the groups that lost most by it get single ranks more. Raises
    `LayershareError` if a group would get no rank at all.
    """
    costs = _costs(spec, groups)
    ranks = [int(rank) for rank in exact]
    left = parameters - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    if left > TOLERANCE * parameters:
        spend(ranks, costs, left, sorted(range(len(groups)), key=lambda i: (ranks[i] - exact[i], i)))
    for group, rank in zip(groups, ranks, strict=True):
        if rank < 1:
            raise LayershareError(
                f"keep leaves no rank for {group.role} of layers {group.layers[0]}–{group.layers[-1]}; keep more."
            )
    return in_order(spec, (Share(g.role, g.layers, rank, g.side) for g, rank in zip(groups, ranks, strict=True)))


def spend(ranks: list[int], costs: Sequence[int], left: int, order: Sequence[int]) -> None:
    """Raise single ranks in this order, round after round, while the parameters that are `left` pay for one."""
    fits = True
    while fits:
        fits = False
        for i in order:
            if costs[i] <= left:
                ranks[i] += 1
                left -= costs[i]
                fits = True


def _costs(spec: Spec, groups: Sequence[LayerGroup]) -> list[int]:
    """Parameters of one unit of rank of each group."""
    return [unit_cost(spec, group.role, group.layers, group.side) for group in groups]
