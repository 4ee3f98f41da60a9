"""Alignment against brute force: costs by their definition, assignments by trying all of them."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from layershare.formulas.align import assign, assign_heads, columns_apart, foldable, members_of, rows_apart


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("weighted", [True, False])
def test_costs_are_errors_on_the_target_s_inputs(size, weighted):
    x = draw(20, 5) if weighted else torch.eye(5, dtype=torch.float64)
    gram = x.T @ x if weighted else None
    anchor, target = draw(5, 6, seed=1), draw(5, 6, seed=2)
    costs = columns_apart(anchor, target, gram, size)
    assert costs.shape == (6 // size, 6 // size)
    for i in range(6 // size):
        for j in range(6 // size):
            a, t = (w[:, k * size : (k + 1) * size] for w, k in ((anchor, i), (target, j)))
            expected = (x @ (t - a)).square().sum() / (x @ target).square().sum()
            torch.testing.assert_close(costs[i, j], expected)


@pytest.mark.parametrize("size", [1, 3])
def test_costs_of_rows_are_those_of_uncorrelated_units(size):
    anchor, target = draw(6, 4, seed=1), draw(6, 4, seed=2)
    energy = draw(6, seed=3).square()
    gram = torch.diag(energy)
    costs = rows_apart(anchor, target, gram, size)
    order = torch.arange(6 // size).flip(0)
    rows = members_of(order, size)
    x = torch.diag(energy[rows].sqrt())  # inputs in the new order
    expected = (x @ (target[rows] - anchor)).square().sum() / (gram.sqrt() @ target).square().sum()
    torch.testing.assert_close(costs[torch.arange(6 // size), order].sum(), expected)
    torch.testing.assert_close(rows_apart(anchor, target, None, size), rows_apart(anchor, target, torch.eye(6), size))


def test_the_cheapest_order():
    costs = draw(5, 5)
    order = assign(costs)
    best = min(sum(costs[i, j] for i, j in enumerate(each)) for each in permutations(range(5)))
    torch.testing.assert_close(costs[torch.arange(5), order].sum(), torch.as_tensor(best))


def test_a_permuted_copy_is_recognised():
    x, anchor, other = draw(50, 8), draw(8, 12, seed=1), draw(12, 8, seed=2)
    hidden = torch.relu(x @ anchor)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    target, written = anchor[:, order], other[order]
    moments = hidden[:, order].T @ hidden[:, order]
    for costs in (columns_apart(anchor, target, x.T @ x), rows_apart(other, written, moments)):
        found = assign(costs)
        assert torch.equal(target[:, found], anchor)
        assert torch.equal(written[found], other)


def test_heads_change_places_within_their_group_and_groups_as_a_whole():
    n_keys, per_key = 3, 2
    keys, queries = draw(n_keys, n_keys), draw(n_keys * per_key, n_keys * per_key, seed=1)
    best = torch.tensor(torch.inf, dtype=torch.float64)
    for outer in permutations(range(n_keys)):
        cost = sum(keys[place, key] for place, key in enumerate(outer))
        for place, key in enumerate(outer):
            cost += min(
                sum(queries[place * per_key + i, key * per_key + j] for i, j in enumerate(inner))
                for inner in permutations(range(per_key))
            )
        best = torch.minimum(best, torch.as_tensor(cost))
    outer, order = assign_heads(keys, queries)
    assert torch.equal(order.view(n_keys, per_key) // per_key, outer[:, None].expand(-1, per_key))
    assert sorted(order.tolist()) == list(range(n_keys * per_key))
    found = keys[torch.arange(n_keys), outer].sum() + queries[torch.arange(n_keys * per_key), order].sum()
    torch.testing.assert_close(found, best)


def test_a_unit_s_members_are_consecutive():
    assert members_of(torch.tensor([2, 0, 1]), 2).tolist() == [4, 5, 0, 1, 2, 3]


def test_scales_that_are_almost_nothing_stay_in_their_norm():
    scale = torch.tensor([2.0, -1.0, 0.0, 1e-5])
    assert foldable(scale).tolist() == [2, -1, 1, 1]
