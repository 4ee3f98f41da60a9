from fractions import Fraction

import pytest

from layershare.errors import LayershareError
from layershare.model.arch import describe
from layershare.plan.budget import measure
from layershare.plan.edits import Share, composition
from layershare.plan.ranks import TOLERANCE, allocate, dense_parameters, group_cost, private_groups
from tests.families import CONFIGS

SPEC = describe(CONFIGS["llama"]())
GROUPS = private_groups(SPEC.linears)
PAYING = [Fraction(dense_parameters(SPEC, group), group_cost(SPEC, group)) for group in GROUPS]
"""The rank from which on factors are no smaller than their matrix."""


def size(shares):
    return measure(SPEC, shares).targets.parameters


def test_ranks_that_use_the_budget_stand_as_they_are():
    exact = [rank * Fraction(7, 10) for rank in PAYING]
    whole = sum(int(rank) * group_cost(SPEC, group) for rank, group in zip(exact, GROUPS, strict=True))
    shares = allocate(SPEC, GROUPS, exact, whole + int(whole * TOLERANCE))
    given = {(share.role, share.layers): share.rank for share in shares}
    assert given == {(group.role, group.layers): int(rank) for rank, group in zip(exact, GROUPS, strict=True)}


def test_single_ranks_go_first_to_groups_that_gain_most():
    exact = [int(rank * Fraction(7, 10)) + Fraction(i, 100) for i, rank in enumerate(PAYING)]
    whole = sum(int(rank) * group_cost(SPEC, group) for rank, group in zip(exact, GROUPS, strict=True))
    spare = group_cost(SPEC, GROUPS[-1]) + int(whole * TOLERANCE)
    for gains, winner in ((None, len(GROUPS) - 1), ([float(-i) for i in range(len(GROUPS))], 0)):
        shares = allocate(SPEC, GROUPS, exact, whole + spare, gains)
        ranks = {(share.role, share.layers): share.rank for share in shares}
        assert ranks[GROUPS[winner].role, GROUPS[winner].layers] > int(exact[winner])
        assert whole < size(shares) <= whole + spare


def test_a_group_whose_rank_does_not_pay_stays_dense():
    exact = [rank / 2 for rank in PAYING]
    exact[3], exact[5] = PAYING[3], PAYING[5] + 100
    parameters = sum(
        min(int(rank) * group_cost(SPEC, group), dense_parameters(SPEC, group))
        for rank, group in zip(exact, GROUPS, strict=True)
    )
    shares = allocate(SPEC, GROUPS, exact, parameters + dense_parameters(SPEC, GROUPS[3]))
    shared = {(share.role, share.layers) for share in shares}
    assert not shared & {(GROUPS[i].role, GROUPS[i].layers) for i in (3, 5)}
    assert size(shares) <= parameters + dense_parameters(SPEC, GROUPS[3])


def test_what_is_left_makes_groups_dense_before_their_factors_outgrow_them():
    parameters = size(()) - 1
    shares = allocate(SPEC, GROUPS, [1] * len(GROUPS), parameters)
    assert parameters * (1 - TOLERANCE) <= size(shares) <= parameters
    for share in shares:
        assert composition(SPEC, share).parameters < SPEC.linear(share.role, share.layers[0]).parameters
    assert allocate(SPEC, GROUPS, PAYING, size(())) == ()


def test_a_group_without_rank_is_refused():
    with pytest.raises(LayershareError, match="keep leaves no rank for q of layers 0–0; keep more"):
        allocate(SPEC, GROUPS, [Fraction(1, 2)] * len(GROUPS), 10)


def test_shares_come_in_the_order_of_the_layers():
    shares = allocate(SPEC, GROUPS[::-1], [2] * len(GROUPS), 10**4)
    assert [share.layers[0] for share in shares] == sorted(share.layers[0] for share in shares)
    assert [share.role for share in shares if share.layers == (0,)] == list(SPEC.roles)
    assert all(isinstance(share, Share) for share in shares)
