"""What each way of sharing a basis in a window of layers is predicted to lose and to save, at a size."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.sharing.formulas import Seen, at, common, frontier, own_losses, polished, pooled, rests, shared_losses
from layershare.plan.ranks import Cost

Values = dict[str, Any]
PARTS = (0.1, 0.3, 0.7)
"""How much of the rank that one shared basis could have is tried as the shared part of a hybrid."""
DIGITS = 4


def spread(n_layers: int, count: int, distance: int, windows: int) -> list[tuple[int, ...]]:
    """So many windows of `count` layers at a distance, from the first layers to the last, evenly; all if there are few.

    There may be none.
    """
    starts = n_layers - (count - 1) * distance
    if starts < 1:
        return []
    chosen = {round(i * (starts - 1) / max(1, windows - 1)) for i in range(windows)}
    return [tuple(start + i * distance for i in range(count)) for start in sorted(chosen)]


def private_curve(member: Seen, *, pivot: bool = True) -> tuple[Tensor, Tensor]:
    """Sizes and losses of a basis of a matrix's own, by rank, and last of the dense matrix."""
    losses = own_losses(member)[1:]
    cost = Cost(member.width + member.other, member.whole, pivot)
    sizes = torch.tensor([float(cost.size(rank)) for rank in range(1, len(losses) + 1)], dtype=torch.float64)
    smaller = sizes < member.whole
    whole = torch.tensor([member.whole], dtype=torch.float64)
    return torch.cat([sizes[smaller], whole]), torch.cat([losses[smaller], torch.zeros_like(whole)])


def group_cost(members: Sequence[Seen], *, pivot: bool = True) -> Cost:
    """Parameters of one basis for all members, by rank."""
    first, n = members[0], len(members)
    return Cost(first.width + n * first.other, n * first.whole, pivot)


def window(members: Sequence[Seen], keep: float, *, polish: bool, thorough: bool = True) -> Values:
    """Way -> predicted loss, that of private bases of the same size, and the part of the parameters saved.

    Every way gets the largest rank within `keep` of the matrices' parameters. All bases are pivoted but in `plain`,
    where the private ones are not either. Common directions and hybrids take long and are left out unless `thorough`.
    """
    cost, own = group_cost(members), [own_losses(member) for member in members]
    rank = int(cost.rank(keep * cost.whole))
    size = int(cost.size(rank))
    basis = pooled(members)
    curve = shared_losses(members, basis)
    found = {"pooled": (size, float(curve[rank]))}
    if polish:
        found["shared"] = size, float(shared_losses(members, polished(members, basis[:, :rank]))[-1])
    if thorough:
        matching = common(members, min(rank, *(len(each) - 1 for each in own)))
        found["common"] = size, float(shared_losses(members, matching)[rank])
        found |= hybrids(members, keep, (basis, matching), polish=polish)
    found["bound"] = size, sum(float(each[min(rank, len(each) - 1)]) for each in own)
    private = frontier([private_curve(member) for member in members])
    result: Values = {"rank": rank, **{name: compared(*private[:2], *point) for name, point in found.items()}}
    plain = group_cost(members, pivot=False)
    rank = int(plain.rank(keep * plain.whole))
    private = frontier([private_curve(member, pivot=False) for member in members])
    result["plain"] = compared(*private[:2], int(plain.size(rank)), float(curve[rank]))
    return result


def hybrids(
    members: Sequence[Seen], keep: float, bases: Sequence[Tensor], *, polish: bool
) -> dict[str, tuple[int, float]]:
    """Size and loss of the best shared basis, of a rank of `PARTS`, with private directions beside.

    `hybrid`, as the library has it: every member has equally many, which are not pivoted. `free hybrid`: as many as are
    best for it, and pivoted, too, with identities in the rows that are pivots of its member's whole basis: a private
    rank r beside a shared k takes r(r + k) parameters less. This one is polished.
    """
    cost, width, other, n = group_cost(members), members[0].width, members[0].other, len(members)
    budget, found = keep * cost.whole, {}
    best: tuple[float, Tensor, list[int]] | None = None
    for basis, part in product(bases, PARTS):
        rank = max(1, round(part * int(cost.rank(budget))))
        private = torch.arange(max(1, min(width, other) - rank), dtype=torch.float64)
        each, lefts = private * (width + other), [left[: len(private)] for left in rests(members, basis[:, :rank])]
        pivoted = each - private**2 - rank * private
        alike = [(n * each, torch.stack(lefts).sum(0))]
        for name, curves in (("hybrid", alike), ("free hybrid", [(pivoted, left) for left in lefts])):
            sizes, losses, entries = frontier(curves)
            sizes = sizes + int(cost.size(rank))
            fits = int((sizes <= budget).sum()) - 1
            if fits < 0 or (name in found and found[name][1] <= float(losses[fits])):
                continue
            found[name] = int(sizes[fits]), float(losses[fits])
            if name == "free hybrid":
                best = float(losses[fits]), basis[:, :rank], entries[fits].tolist()
    if polish and best is not None:
        loss, basis, ranks = best
        lefts = rests(members, polished(members, basis, ranks))
        better = sum(float(left[rank]) for left, rank in zip(lefts, ranks, strict=True))
        found["free hybrid"] = found["free hybrid"][0], min(loss, better)
    return found


def compared(sizes: Tensor, losses: Tensor, size: int, loss: float) -> list[float]:
    """Loss, that of private bases of this size, and the part of the parameters saved against private bases as good."""
    private = at(losses.flip(0), sizes.flip(0), loss)
    return [float(f"{x:.{DIGITS}g}") for x in (loss, at(sizes, losses, size), 1 - size / private)]
