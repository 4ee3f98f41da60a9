from fractions import Fraction

import pytest
from transformers import AutoConfig

from layershare.errors import LayershareError
from layershare.methods import METHODS, make_method, plan_with
from layershare.model.describe import describe
from layershare.plan.budget import Keep, measure, parse_keep
from layershare.plan.edits import Delta, Share, places
from layershare.plan.ranks import uniform_rank
from tests.families import CONFIGS


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        (0.8, Keep(fraction=Fraction(4, 5))),
        ("1", Keep(fraction=Fraction(1))),
        ("5.4B", Keep(parameters=5_400_000_000)),
        ("350 M", Keep(parameters=350_000_000)),
        ("11GB", Keep(bytes=11_000_000_000)),
        ("1.5GiB", Keep(bytes=3 * 2**29)),
    ],
)
def test_keep_is_a_fraction_parameters_or_bytes(text, keep):
    assert parse_keep(text) == keep


@pytest.mark.parametrize("text", ["0", -0.1, 1.01, "12", "-3B", "80%", "5 apples", ""])
def test_other_keeps_are_refused(text):
    with pytest.raises(LayershareError, match="keep="):
        parse_keep(text)


@pytest.mark.parametrize(
    ("d_in", "d_out", "n", "rank"),
    [
        (4096, 4096, 1, 1638),
        (4096, 4096, 2, 2184),
        (4096, 4096, 4, 2621),
        (4096, 4096, 8, 2912),
        (4096, 11008, 1, 2388),
        (4096, 11008, 2, 2762),
        (4096, 11008, 4, 2997),
        (4096, 11008, 8, 3131),
    ],
)
def test_published_ranks_of_basis_sharing_at_keep_08(d_in, d_out, n, rank):
    assert uniform_rank(d_in, d_out, n, 0.8) == rank


def test_a_plan_for_llama_7b_has_the_published_ranks():
    plan = plan_with(
        describe(AutoConfig.for_model("llama")), "basis-sharing", make_method("basis-sharing"), 0.8, "targets"
    )
    ranks = {(edit.roles[0], len(edit.layers)): edit.rank for edit in plan.edits if isinstance(edit, Share)}
    assert ranks == {
        **{(role, 2): 2184 for role in "qkv"},
        **{(role, 2): 2762 for role in ("gate", "up")},
        ("o", 1): 1638,
        ("down", 1): 2388,
    }


RANKED = [name for name in METHODS if not make_method(name).adaptive and name not in ("slicegpt", "delta")]
"""The methods whose plans need no evidence and can use single ranks; a slice of all layers is coarser."""


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("method", RANKED)
def test_plans_never_exceed_their_budget_and_use_it_up_to_half_a_percent(family, method):
    spec = describe(CONFIGS[family]())
    for size in (2, 3, 4) if method == "basis-sharing" else (1,):
        options = make_method(method, {"group_size": size} if size > 1 else {})
        for keep in (0.9, 0.63, 0.5):
            plan = plan_with(spec, method, options, keep, "targets")
            assert 0.995 * keep <= plan.after.targets.parameters / plan.before.targets.parameters <= keep
            plan = plan_with(spec, method, options, keep + 0.08, "all")
            assert 0.995 <= plan.after.all.parameters / (plan.before.all.parameters * (keep + 0.08)) <= 1


def test_remainder_groups_stay_in_the_budget_in_models_of_real_size():
    spec = describe(AutoConfig.for_model("llama"))
    for size in (3, 5, 6, 7):
        plan = plan_with(spec, "basis-sharing", make_method("basis-sharing", {"group_size": size}), 0.8, "targets")
        assert 0.796 <= plan.after.targets.parameters / plan.before.targets.parameters <= 0.8
        assert {len(edit.layers) for edit in plan.edits if isinstance(edit, Share) and edit.roles == ("q",)} == {
            size,
            32 % size,
        }


@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize("method", ["svd-llm", "basis-sharing"])
def test_ranks_in_multiples(method, pivot):
    spec = describe(AutoConfig.for_model("llama"))
    for multiple in (8, 128):
        options = make_method(method, {"multiple": multiple, "pivot": pivot})
        for keep in (0.8, 0.5):
            plan = plan_with(spec, method, options, keep, "targets")
            assert all(edit.rank % multiple == 0 for edit in plan.edits if isinstance(edit, Share))
            assert 0.985 * keep < plan.after.targets.parameters / plan.before.targets.parameters <= keep
    with pytest.raises(LayershareError, match="or set a smaller multiple"):
        plan_with(spec, method, make_method(method, {"multiple": 8192}), 0.5, "targets")


def test_keep_in_parameters_and_in_bytes():
    spec, method = describe(CONFIGS["llama"]()), make_method("svd-llm")
    dense = measure(spec, ())
    for of in ("all", "targets"):
        before = getattr(dense, of)
        plan = plan_with(spec, "svd-llm", method, f"{before.parameters * 0.7 / 1e3:.3f}K", of)
        assert 0.995 * 0.7 < getattr(plan.after, of).parameters / before.parameters <= 0.7001
        plan = plan_with(spec, "svd-llm", method, f"{before.bytes * 0.7 / 1e3:.3f}kB", of)
        assert 0.98 * 0.7 < getattr(plan.after, of).bytes / before.bytes <= 0.7001


@pytest.mark.parametrize(
    ("method", "options"),
    [("svd-llm", {}), ("svd-llm", {"pivot": True}), ("basis-sharing", {}), ("slicegpt", {})],
)
def test_keep_of_multiplications(method, options):
    spec = describe(AutoConfig.for_model("llama"))  # of real size, so that small steps are possible
    for keep in (0.8, 0.5):
        plan = plan_with(spec, method, make_method(method, options), keep, "multiplications")
        assert 0.95 * keep < plan.after.all.multiplications / plan.before.all.multiplications <= keep
        if method == "basis-sharing":  # a basis is stored once, and multiplied for every layer
            assert plan.after.all.parameters / plan.before.all.parameters < keep - 0.05
    with pytest.raises(LayershareError, match="The output head alone takes"):
        plan_with(spec, method, make_method(method, options), 0.01, "multiplications")
    with pytest.raises(LayershareError, match="Multiplications have no bytes"):
        plan_with(spec, method, make_method(method, options), "5GB", "multiplications")


def test_deltas_save_no_multiplications():
    spec = describe(AutoConfig.for_model("llama"))
    with pytest.raises(LayershareError, match="they never save multiplications"):
        plan_with(spec, "delta", make_method("delta"), 0.9, "multiplications")


@pytest.mark.parametrize("of", ["all", "targets"])
def test_keep_that_cannot_be_met_is_refused(of):
    spec, method = describe(CONFIGS["llama"]()), make_method("svd")
    with pytest.raises(LayershareError, match="nothing to compress"):
        plan_with(spec, "svd", method, "5B", of)
    with pytest.raises(LayershareError, match="cannot be compressed" if of == "all" else "no rank"):
        plan_with(spec, "svd", method, 0.01, of)


def test_other_ways_to_count_are_refused():
    with pytest.raises(LayershareError, match="Did you mean 'targets'"):
        plan_with(describe(CONFIGS["llama"]()), "svd", make_method("svd"), 0.8, "target")


def test_keep_1_leaves_the_model_as_it_is():
    plan = plan_with(describe(CONFIGS["llama"]()), "basis-sharing", make_method("basis-sharing"), 1, "all")
    assert plan.edits == ()
    assert plan.after == plan.before


def test_counts_of_one_group_by_hand():
    spec = describe(CONFIGS["llama"]())
    gate = spec.linear("gate", 0)
    before = measure(spec, ())
    shared = measure(spec, [Share(places("gate", (0, 1, 2)), 5, "input")])
    assert before.targets.parameters - shared.targets.parameters == (
        3 * gate.d_in * gate.d_out - 5 * (gate.d_in + 3 * gate.d_out)
    )
    assert before.all.multiplications - shared.all.multiplications == (
        3 * gate.d_in * gate.d_out - 3 * 5 * (gate.d_in + gate.d_out)
    )
    written = measure(spec, [Share(places("gate", (0, 1, 2)), 5, "output")])
    assert before.all.parameters - written.all.parameters == (
        3 * gate.d_in * gate.d_out - 5 * (3 * gate.d_in + gate.d_out)
    )


def test_counts_of_deltas_by_hand():
    spec = describe(CONFIGS["llama"]())
    gate = spec.linear("gate", 0)
    dense, delta = gate.d_in * gate.d_out, 5 * (gate.d_in + gate.d_out)
    before = measure(spec, ())
    for edit, users in ((Delta("gate", 0, (1, 2), 5), 3), (Delta("gate", 0, (0, 2), 5), 2)):
        after = measure(spec, [edit])
        for part in ("all", "targets"):
            old, new = getattr(before, part), getattr(after, part)
            assert old.parameters - new.parameters == (users - 1) * dense - 2 * delta
            assert new.multiplications - old.multiplications == 2 * delta
        assert before.targets.bytes - after.targets.bytes == 4 * ((users - 1) * dense - 2 * delta)
