"""Choosing ranks, dense matrices and groups together: least predicted loss at a size, by the price of a parameter.

Every alternative has a curve of loss against size. At a price μ for a parameter each curve has a point of least
loss + μ · size, a dynamic programme over the layers chooses between alternatives that cover the same layers, and μ is
bisected until the sizes meet the budget.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from layershare.plan.ranks import Group

CLOSE = 1e-6
"""Prices are bisected until they differ by this fraction."""
HIGHEST = 1e100
"""No price is above this, or below its inverse: it would outweigh every loss, or none."""
Key = TypeVar("Key")


class Form(NamedTuple):
    """What may stand in a group's place: factors of a rank, `None` for what is dense, in floats or as integers.

    `bits`: of a number of the basis, and of all others; `None` for floats.
    """

    rank: int | None = None
    bits: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Curve:
    """What a group costs at each size that is offered, sizes rising: `losses` and `sizes` (float64) of its `forms`.

    The last one may be the dense matrix as it is, which loses nothing.
    """

    group: Group
    forms: Sequence[Form]
    losses: Tensor
    sizes: Tensor

    def best(self, price: float) -> int:
        """The entry of least loss + price · size; of equal ones the smallest."""
        return int((self.losses + price * self.sizes).argmin())


@dataclass(frozen=True, eq=False)
class Window:
    """Layers `first` to before `end`, and curves of groups that together cover a family of roles in them."""

    first: int
    end: int
    curves: tuple[Curve, ...]


@dataclass
class Choice:
    """A curve and the entry that is taken of it."""

    curve: Curve
    entry: int

    @property
    def form(self) -> Form:
        """What will stand in the group's place."""
        return self.curve.forms[self.entry]

    @property
    def loss(self) -> float:
        """What it adds to the predicted loss."""
        return float(self.curve.losses[self.entry])

    @property
    def size(self) -> float:
        """What it takes of the budget."""
        return float(self.curve.sizes[self.entry])

    def next_step(self, left: float) -> tuple[float, int] | None:
        """The larger entry within `left` that takes off most loss for its size: −loss/size and the entry, if any."""
        sizes, losses = self.curve.sizes[self.entry :], self.curve.losses[self.entry :]
        steps = sizes - sizes[0]
        fits = (steps > 0) & (steps <= left) & (losses < losses[0])
        if not fits.any():
            return None
        gains = torch.where(fits, (losses - losses[0]) / steps.clamp(min=1), math.inf)
        at = int(gains.argmin())
        return float(gains[at]), self.entry + at


def frontier(losses: Tensor, sizes: Tensor) -> Tensor:
    """The entries, sizes rising, beside which no other one is as small and loses as little."""
    order = losses.argsort(stable=True)
    order = order[sizes[order].argsort(stable=True)]
    least = torch.cat([losses.new_full((1,), math.inf), losses[order].cummin(0).values[:-1]])
    return order[losses[order] < least]


def choose(families: Mapping[Key, Sequence[Window]], n_layers: int, budget: float) -> list[Choice]:
    """The choice of least loss whose sizes sum to no more than `budget`, as prices find it.

    Each family's windows are to be chosen so that they cover every layer once. What no price spends goes, step by step,
    to where it takes off most loss for its size. Raises `ValueError` if the smallest entries of all are too large.
    """

    def at(price: float) -> list[Choice]:
        return [choice for windows in families.values() for choice in _cheapest(windows, n_layers, price)]

    low, high = 0.0, 1.0
    while _size(at(high)) > budget:
        low, high = high, high * 16
        if high > HIGHEST:
            raise ValueError("no choice is within the budget")
    while low == 0 and high > 1 / HIGHEST and _size(at(high / 16)) <= budget:
        high /= 16
    low = max(low, high / 16)
    while high / low > 1 + CLOSE:
        price = math.sqrt(low * high)
        low, high = (price, high) if _size(at(price)) > budget else (low, price)
    choices = at(high)
    _spend(choices, budget - _size(choices))
    return choices


def _cheapest(windows: Sequence[Window], n_layers: int, price: float) -> list[Choice]:
    """The windows of least loss + price · size that cover all layers, each once: a dynamic programme."""
    ending: dict[int, list[tuple[Window, list[Choice], float]]] = {}
    for window in windows:
        chosen = [Choice(curve, curve.best(price)) for curve in window.curves]
        total = sum(choice.loss + price * choice.size for choice in chosen)
        ending.setdefault(window.end, []).append((window, chosen, total))
    best: list[tuple[float, list[Choice]]] = [(0.0, [])] + [(math.inf, [])] * n_layers
    for end in range(1, n_layers + 1):
        for window, chosen, total in ending.get(end, ()):
            before, path = best[window.first]
            if before + total < best[end][0]:
                best[end] = before + total, [*path, *chosen]
    return best[n_layers][1]


def _size(choices: Sequence[Choice]) -> float:
    return sum(choice.size for choice in choices)


def _spend(choices: Sequence[Choice], left: float) -> None:
    """Raise entries in place as long as any larger one fits into what is `left`."""
    queue = [(step, i) for i, choice in enumerate(choices) if (step := choice.next_step(left)) is not None]
    heapq.heapify(queue)
    while queue:
        (_, entry), i = heapq.heappop(queue)
        choice = choices[i]
        size = float(choice.curve.sizes[entry]) - choice.size
        if entry > choice.entry and size <= left:
            choice.entry = entry
            left -= size
        step = choice.next_step(left)
        if step is not None:
            heapq.heappush(queue, (step, i))
