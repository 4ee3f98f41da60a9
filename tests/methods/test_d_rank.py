from fractions import Fraction
from math import exp, log, sqrt

import pytest
import torch

from layershare.errors import LayershareError
from layershare.methods import make_method, plan_with
from layershare.methods.d_rank import effective_rank, in_proportion, to_v
from layershare.plan.edits import Share, composition, places
from layershare.plan.ranks import Group
from tests.families import WIDTH, tiny_model
from tests.methods.evidence import measured, set_spectrum, unmeasured

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")


def planned(evidence, keep, of="targets", **options):
    return plan_with(evidence.spec, "d-rank", make_method("d-rank", options), keep, of, evidence)


def ranks_of(plan, role):
    return [edit.rank for edit in plan.edits if isinstance(edit, Share) and edit.roles == (role,)]


def test_effective_rank_is_the_exponential_of_the_spectral_entropy():
    energies = [4.0, 2.0, 1.0, 1.0, 0.0]
    entropy = -sum(e / 8 * log(e / 8) for e in energies if e)
    assert effective_rank(torch.tensor(energies, dtype=torch.float64)) == pytest.approx(exp(entropy))
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.zeros(7)) == 1


def test_parameters_within_a_role_follow_equation_7_and_stop_at_the_dense_matrices():
    effective, cost, total = [100.0, 25.0, 4.0], [60, 60, 90], Fraction(3000)
    parts = in_proportion(total, [sqrt(r * w) for r, w in zip(effective, cost, strict=True)], [10**6] * 3)
    scale = 3000 / sum(sqrt(r * w) for r, w in zip(effective, cost, strict=True))
    for part, r, w in zip(parts, effective, cost, strict=True):
        assert float(part / w) == pytest.approx(scale * sqrt(r) / sqrt(w))
    assert sum(parts) == total
    assert in_proportion(Fraction(100), [3, 2, 1], [30, 1000, 1000]) == [30, Fraction(140, 3), Fraction(70, 3)]
    assert in_proportion(Fraction(100), [8, 1, 1], [30, 1000, 36]) == [30, 35, 35]
    assert in_proportion(Fraction(60), [1, 5, 9], [10, 20, 30]) == [10, 20, 30]


def test_v_gets_equal_parts_from_q_and_k_by_layers_and_no_more_than_it_can_use():
    groups = [Group(places(role, layers), "input") for role in "qkv" for layers in ((0, 1), (2,))]
    sizes = dict(zip(groups, map(Fraction, (40, 20, 30, 10, 50, 25)), strict=True))
    moved = to_v(sizes, dict.fromkeys(groups, 1000), Fraction(3, 10))
    assert list(moved.values()) == [28, 14, 21, 7, 70, 35]  # equations 9 to 12, t = 10 per layer
    narrow = to_v(sizes, dict.fromkeys(groups, 60), Fraction(3, 10))  # v's first group is full at 60 and takes half
    assert list(narrow.values()) == [Fraction(x) * 8 / 10 for x in (40, 20, 30, 10)] + [60, 35]
    assert sum(narrow.values()) == sum(sizes.values())
    assert to_v(dict.fromkeys(groups[:2], Fraction(5)), dict.fromkeys(groups, 9), Fraction(1, 2)) == dict.fromkeys(
        groups[:2], Fraction(5)
    )


def test_the_ranks_of_a_plan_are_those_of_the_paper_s_formula(tmp_path, tokenizer, words):
    evidence = measured(tiny_model("gpt2"), tmp_path, tokenizer, words, "inputs")
    plan = planned(evidence, 0.6)
    up = [edit for edit in plan.edits if isinstance(edit, Share) and edit.roles == ("up",)]
    assert [edit.layers for edit in up] == [(0, 1), (2, 3)]
    effective, omega = [], 32 + 2 * 128
    for edit in up:
        linears = [evidence.spec.linear("up", layer) for layer in edit.layers]
        gram = sum(evidence.stats.gram(linear).double() for linear in linears)
        scaled = torch.linalg.cholesky(gram).T @ torch.cat([evidence.weight(x).double() for x in linears], dim=1)
        p = torch.linalg.svdvals(scaled).square()
        p = p / p.sum()
        effective.append(float((-p * p.log()).sum().exp()))
    budget = 0.6 * 4 * 32 * 128
    for edit, r in zip(up, effective, strict=True):
        exact = budget / sum(sqrt(e * omega) for e in effective) * sqrt(r) / sqrt(omega)
        assert int(exact) <= edit.rank <= int(exact) + 1  # small models get single ranks more


def test_flat_spectra_get_more_rank_than_falling_ones(tmp_path, tokenizer, words):
    model = tiny_model("gptj")
    flat, falling = torch.ones(WIDTH), 0.5 ** torch.arange(WIDTH)
    for layer, values in enumerate((flat, flat, falling, falling)):
        set_spectrum(model, f"transformer.h.{layer}.attn.q_proj", values)
    evidence = measured(model, tmp_path, tokenizer, words, "inputs")
    first, second = ranks_of(planned(evidence, 0.6), "q")
    assert first > second >= 1


def test_beta_moves_parameters_from_q_and_k_to_v(tmp_path, tokenizer, words):
    evidence = measured(tiny_model("gptj"), tmp_path, tokenizer, words, "inputs")
    total = {
        beta: {role: sum(ranks_of(planned(evidence, 0.5, beta=beta), role)) for role in "qkv"} for beta in (0, 0.35)
    }
    for role in "qk":
        assert total[0.35][role] == pytest.approx(0.65 * total[0][role], abs=2)
    assert total[0.35]["v"] == pytest.approx(total[0]["v"] + 0.35 * (total[0]["q"] + total[0]["k"]), abs=2)


def test_groups_of_one_with_grouped_query_attention_unless_asked_otherwise(tmp_path, tokenizer, words):
    evidence = measured(tiny_model("llama"), tmp_path, tokenizer, words, "inputs")
    plan = planned(evidence, 0.5)
    assert {len(edit.layers) for edit in plan.edits if isinstance(edit, Share)} == {1}
    grouped = [edit for edit in planned(evidence, 0.5, group_size=4).edits if isinstance(edit, Share)]
    assert {edit.layers for edit in grouped if edit.roles == ("q",)} == {(0, 1, 2, 3)}
    # v is a quarter of q and k: more than it can hold is offered, so that it stays dense
    assert not ranks_of(planned(evidence, 0.8, beta=0.9), "v")


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "falcon", "gptj"])
def test_plans_use_their_budget_up_to_half_a_percent(family, tmp_path, tokenizer, words):
    evidence = measured(tiny_model(family), tmp_path, tokenizer, words, "inputs")
    for keep, of, options in (
        (0.9, "targets", {}),
        (0.63, "targets", {"group_size": 3}),
        (0.5, "targets", {"beta": 0.5}),
        (0.7, "all", {}),
    ):
        plan = planned(evidence, keep, of, **options)
        kept = getattr(plan.after, of).parameters / getattr(plan.before, of).parameters
        assert 0.995 * keep <= kept <= keep
        for edit in plan.edits:
            assert isinstance(edit, Share)
            linear = evidence.spec.linear(*edit.places[0])
            assert composition(evidence.spec, edit).parameters < len(edit.layers) * linear.parameters


def test_the_refit_is_basis_sharing_s():
    assert make_method("d-rank").refits(0.6)
    assert not make_method("d-rank").refits(0.61)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"group_size": 0}, "group_size"),
        ({"bta": 0.1}, "Did you mean 'beta'"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, message):
    with pytest.raises(LayershareError, match=message):
        make_method("d-rank", options)


def test_roles_that_the_model_does_not_have_are_refused():
    evidence = unmeasured(tiny_model("gpt2"))
    with pytest.raises(LayershareError, match="has no role 'q'"):
        planned(evidence, 0.8, shared="q,k")
