from fractions import Fraction

import pytest

from layershare.errors import LayershareError
from layershare.model.describe import describe
from layershare.plan.budget import measure
from layershare.plan.edits import Share, composition, places
from layershare.plan.ranks import TOLERANCE, Group, allocate, group_cost, private_groups
from tests.families import CONFIGS

SPEC = describe(CONFIGS["llama"]())
GROUPS = private_groups(SPEC.linears)
COSTS = [group_cost(SPEC, group) for group in GROUPS]
PAYING = [Fraction(cost.whole, cost.linear) for cost in COSTS]
"""The rank from which on factors are no smaller than their matrix."""


def size(shares):
    return measure(SPEC, shares).targets.parameters


def test_ranks_that_use_the_budget_stand_as_they_are():
    exact = [rank * Fraction(7, 10) for rank in PAYING]
    whole = sum(cost.size(int(rank)) for rank, cost in zip(exact, COSTS, strict=True))
    shares = allocate(SPEC, GROUPS, exact, whole + int(whole * TOLERANCE))
    given = {share.places: share.rank for share in shares}
    assert given == {group.places: int(rank) for rank, group in zip(exact, GROUPS, strict=True)}


def test_single_ranks_go_first_to_groups_that_gain_most():
    exact = [int(rank * Fraction(7, 10)) + Fraction(i, 100) for i, rank in enumerate(PAYING)]
    whole = sum(cost.size(int(rank)) for rank, cost in zip(exact, COSTS, strict=True))
    spare = COSTS[-1].linear + int(whole * TOLERANCE)
    for gains, winner in ((None, len(GROUPS) - 1), ([float(-i) for i in range(len(GROUPS))], 0)):
        shares = allocate(SPEC, GROUPS, exact, whole + spare, gains)
        ranks = {share.places: share.rank for share in shares}
        assert ranks[GROUPS[winner].places] > int(exact[winner])
        assert whole < size(shares) <= whole + spare


def test_a_group_whose_rank_does_not_pay_stays_dense():
    exact = [rank / 2 for rank in PAYING]
    exact[3], exact[5] = PAYING[3], PAYING[5] + 100
    parameters = sum(cost.size(int(rank)) for rank, cost in zip(exact, COSTS, strict=True))
    shares = allocate(SPEC, GROUPS, exact, parameters + COSTS[3].whole)
    shared = {share.places for share in shares}
    assert not shared & {GROUPS[i].places for i in (3, 5)}
    assert size(shares) <= parameters + COSTS[3].whole


def test_what_is_left_makes_groups_dense_before_their_factors_outgrow_them():
    parameters = size(()) - 1
    shares = allocate(SPEC, GROUPS, [1] * len(GROUPS), parameters)
    assert parameters * (1 - TOLERANCE) <= size(shares) <= parameters
    for share in shares:
        assert composition(SPEC, share).parameters < SPEC.linear(*share.places[0]).parameters
    assert allocate(SPEC, GROUPS, PAYING, size(())) == ()


def test_a_group_without_rank_is_refused():
    with pytest.raises(LayershareError, match="keep leaves no rank for q of layers 0–0; keep more"):
        allocate(SPEC, GROUPS, [Fraction(1, 2)] * len(GROUPS), 10)


def test_shares_come_in_the_order_of_the_layers():
    shares = allocate(SPEC, GROUPS[::-1], [2] * len(GROUPS), 10**4)
    assert [share.layers[0] for share in shares] == sorted(share.layers[0] for share in shares)
    assert [share.roles[0] for share in shares if share.layers == (0,)] == list(SPEC.roles)
    assert all(isinstance(share, Share) for share in shares)


@pytest.mark.parametrize("layers", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("role", SPEC.roles)
def test_a_pivoted_basis_costs_the_square_of_its_rank_less(role, layers):
    plain, pivoted = (group_cost(SPEC, Group(places(role, layers), "input", pivot)) for pivot in (False, True))
    for rank in range(1, 60):
        assert pivoted.size(rank) <= plain.size(rank)
        if pivoted.size(rank) < pivoted.whole:
            assert pivoted.size(rank) == rank * plain.linear - rank**2
            assert (
                pivoted.size(rank)
                == composition(SPEC, Share(places(role, layers), rank, "input", pivot=True)).parameters
            )
            assert pivoted.rank(Fraction(pivoted.size(rank))) == rank
    assert pivoted.size(pivoted.rank(pivoted.whole)) == pivoted.whole


def test_ranks_of_pivoted_bases_are_higher_at_the_same_size():
    groups = private_groups(SPEC.linears, pivot=True)
    for keep in (Fraction(1, 2), Fraction(4, 5)):
        budget = int(keep * size(()))
        plain, pivoted = (
            allocate(SPEC, each, [cost.rank(keep * cost.whole) for cost in (group_cost(SPEC, g) for g in each)], budget)
            for each in (GROUPS, groups)
        )
        for shares in (plain, pivoted):
            assert (1 - TOLERANCE) * budget <= size(shares) <= budget
        assert sum(share.rank for share in pivoted) > 1.1 * sum(share.rank for share in plain)
        assert measure(SPEC, pivoted).targets.multiplications <= size(())
        for share in pivoted:  # of groups of one no layer multiplies more than the dense one
            assert measure(SPEC, [share]).all.multiplications < measure(SPEC, ()).all.multiplications
