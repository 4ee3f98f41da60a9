"""The choice of ranks against every possible one."""

import random
from collections.abc import Sequence
from itertools import pairwise, product

import pytest
import torch

from layershare.plan.edits import places
from layershare.plan.ranks import Group
from layershare.plan.search import Curve, Form, Window, choose, frontier

DENSE = 200.0


def curve(chance: random.Random, entries: int = 5, *, concave: bool = False) -> Curve:
    """A curve of falling losses, dense last; with `concave` sizes whose steps shrink, as pivoted bases have them."""
    losses = sorted((chance.uniform(0, 10) for _ in range(entries - 1)), reverse=True)
    parts = [k / entries for k in range(1, entries)]
    sizes = [DENSE * (2 * part - part**2 if concave else part) for part in parts]
    numbers = torch.tensor([*losses, 0.0]).double(), torch.tensor([*sizes, DENSE]).double()
    return Curve(Group(places("q", [0]), "input"), [*map(Form, range(1, entries)), Form()], *numbers)


def alone(curves: list[Curve]) -> dict[int, list[Window]]:
    return {i: [Window(0, 1, (each,))] for i, each in enumerate(curves)}


def totals(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """(loss, size) of every choice."""
    found = []
    for entries in product(*(range(len(each.forms)) for each in curves)):
        picked = list(zip(curves, entries, strict=True))
        found.append((sum(float(c.losses[i]) for c, i in picked), sum(float(c.sizes[i]) for c, i in picked)))
    return found


def corners(every: list[tuple[float, float]]) -> set[tuple[float, float]]:
    """The choices that are the cheapest of all at some price: those of the lower convex hull."""
    prices = [1.1**exponent for exponent in range(-120, 60)]
    return {min(every, key=lambda each: (each[0] + price * each[1], each[1])) for price in prices}


def check(families: dict[int, list[Window]], layers: int, every: list[tuple[float, float]]) -> None:
    """At the size of each corner no choice loses less than ours, and between them ours is within its budget."""
    found = sorted(corners(every), key=lambda each: each[1])
    assert len(found) > 3
    for loss, size in found:
        ours = choose(families, layers, size + 1e-6)
        assert sum(x.loss for x in ours) == pytest.approx(loss, abs=1e-9)
        assert sum(x.size for x in ours) <= size + 1e-6
    for (worse, small), (better, large) in pairwise(found):
        ours = choose(families, layers, (small + large) / 2)
        assert sum(x.size for x in ours) <= (small + large) / 2
        assert better - 1e-9 <= sum(x.loss for x in ours) <= worse + 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_ranks_are_the_best_of_all(seed):
    chance = random.Random(seed)
    curves = [curve(chance, concave=seed % 2 == 1) for _ in range(4)]
    check(alone(curves), 1, totals(curves))


@pytest.mark.parametrize("seed", range(5))
def test_windows_are_the_best_cover_of_all(seed):
    chance, layers = random.Random(seed), 4
    windows = [
        Window(first, first + n, tuple(curve(chance, 3) for _ in range(chance.choice((1, n)))))
        for first in range(layers)
        for n in (1, 2, 3)
        if first + n <= layers
    ]

    def covers(start: int) -> list[list[Window]]:
        if start == layers:
            return [[]]
        return [[w, *rest] for w in windows if w.first == start for rest in covers(w.end)]

    every = [total for cover in covers(0) for total in totals([c for w in cover for c in w.curves])]
    check({0: windows}, layers, every)
    chosen = choose({0: windows}, layers, 3 * DENSE)
    taken = [w for w in windows if any(x.curve in w.curves for x in chosen)]
    assert sorted(layer for w in taken for layer in range(w.first, w.end)) == list(range(layers))


@pytest.mark.parametrize("seed", range(5))
def test_what_is_left_is_spent(seed):
    chance = random.Random(seed)
    curves = [curve(chance, 6, concave=True) for _ in range(3)]
    budget = chance.uniform(0.4, 0.95) * 3 * DENSE
    ours = choose(alone(curves), 1, budget)
    left = budget - sum(x.size for x in ours)
    assert left >= 0
    for each in ours:
        larger = range(each.entry + 1, len(each.curve.forms))
        assert all(float(each.curve.sizes[i]) - each.size > left for i in larger)


def test_everything_fits_and_nothing_does():
    curves = [curve(random.Random(seed)) for seed in range(3)]
    assert [x.form.rank for x in choose(alone(curves), 1, 3 * DENSE)] == [None] * 3
    smallest = sum(float(c.sizes[0]) for c in curves)
    assert [x.form.rank for x in choose(alone(curves), 1, smallest)] == [1] * 3
    with pytest.raises(ValueError, match="no choice"):
        choose(alone(curves), 1, smallest - 1)


def test_it_is_the_same_every_time():
    curves = [curve(random.Random(seed), 30, concave=True) for seed in range(12)]
    first, second = (choose(alone(curves), 1, 0.6 * 12 * DENSE) for _ in range(2))
    assert [x.entry for x in first] == [x.entry for x in second]


def test_a_frontier_is_of_what_nothing_is_better_than():
    chance = random.Random(0)
    losses = torch.tensor([chance.randrange(12) for _ in range(80)]).double()
    sizes = torch.tensor([chance.randrange(1, 30) for _ in range(80)]).double()
    found = frontier(losses, sizes).tolist()
    every = list(zip(losses.tolist(), sizes.tolist(), strict=True))
    best = {each for each in every if not any(o != each and o[0] <= each[0] and o[1] <= each[1] for o in every)}
    assert [every[entry] for entry in found] == sorted(best, key=lambda each: each[1])
