import json
from typing import Any

import pytest
import torch

import layershare
from layershare.errors import LayershareError
from layershare.methods import make_method, plan_with
from layershare.methods.welore import normalised, threshold_ranks
from layershare.plan.edits import Share, composition
from layershare.plan.ranks import Cost
from tests.families import WIDTH, tiny_model
from tests.methods.evidence import set_spectrum, unmeasured


def planned(evidence, keep, of="targets"):
    return plan_with(evidence.spec, "welore", make_method("welore"), keep, of, evidence)


def ranks_of(plan) -> dict[tuple[str, int], int]:
    return {edit.places[0]: edit.rank for edit in plan.edits if isinstance(edit, Share)}


def test_one_threshold_on_normalised_values_keeps_to_the_budget():
    generator = torch.Generator().manual_seed(0)
    spectra = [
        normalised(torch.rand(n, generator=generator, dtype=torch.float64).sort(descending=True).values)
        for n in (20, 30, 25)
    ]
    costs, dense = [50, 70, 60], [600, 1000, 625]
    all_costs = [Cost(cost, whole) for cost, whole in zip(costs, dense, strict=True)]
    for parameters in (700, 1100, 1600):
        ranks = threshold_ranks(spectra, all_costs, parameters)

        def size(ranks):
            return sum(min(k * cost, whole) for k, cost, whole in zip(ranks, costs, dense, strict=True))

        best = []
        for threshold in sorted(torch.cat(spectra).tolist()):  # brute force
            kept = [int((values >= threshold).sum()) for values in spectra]
            if size(kept) <= parameters:
                best = kept
                break
        # beyond rank dense/cost a matrix is dense, and more of its values cost nothing
        full = [whole / cost for whole, cost in zip(dense, costs, strict=True)]
        assert [min(k, f) for k, f in zip(ranks, full, strict=True)] == [
            min(k, f) for k, f in zip(best, full, strict=True)
        ]
        assert size(ranks) <= parameters


def test_a_matrix_of_exact_rank_r_gets_no_more_and_flat_ones_stay_dense():
    model = tiny_model("llama")
    flat, low = torch.linspace(1, 0.9, WIDTH), torch.zeros(WIDTH)
    low[:3] = torch.tensor([1.0, 0.9, 0.8])
    flat[-1] = 0  # min-max normalisation maps the smallest to 0
    for layer in range(4):
        set_spectrum(model, f"model.layers.{layer}.self_attn.o_proj", low)
        set_spectrum(model, f"model.layers.{layer}.self_attn.q_proj", flat)
    plan = planned(unmeasured(model), 0.7)
    ranks = ranks_of(plan)
    assert all(ranks["o", layer] == 3 for layer in range(4))
    assert all(("q", layer) not in ranks for layer in range(4))  # dense
    assert all((role, layer) in ranks for role in ("gate", "up", "down") for layer in range(4))


def test_a_model_in_memory_is_planned_without_a_text():
    model = tiny_model("llama")
    assert layershare.make_plan(model, method="welore", keep=0.7, of="targets") == planned(unmeasured(model), 0.7)
    with pytest.raises(LayershareError, match="plans by what it measures"):
        layershare.make_plan(model.config, method="welore")


def test_a_rank_that_would_not_pay_is_never_given():
    evidence = unmeasured(tiny_model("llama"))
    for edit in planned(evidence, 0.9).edits:
        assert isinstance(edit, Share)
        assert composition(evidence.spec, edit).parameters < evidence.spec.linear(*edit.places[0]).parameters


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "falcon"])
@pytest.mark.parametrize(("keep", "of"), [(0.9, "targets"), (0.5, "targets"), (0.7, "all")])
def test_plans_use_their_budget_up_to_half_a_percent(family, keep, of):
    evidence = unmeasured(tiny_model(family))
    plan = planned(evidence, keep, of)
    kept = getattr(plan.after, of).parameters / getattr(plan.before, of).parameters
    assert 0.995 * keep <= kept <= keep


def test_equal_singular_values_are_all_kept_or_none():
    assert normalised(torch.full((4,), 3.0)).tolist() == [1, 1, 1, 1]
    assert normalised(torch.tensor([5.0, 3.0, 1.0])).tolist() == [1, 0.5, 0]


def test_what_is_asked_for_in_vain_is_said_in_one_sentence():
    evidence = unmeasured(tiny_model("llama"))
    with pytest.raises(LayershareError, match=r"Unknown option of welore 'threshold'\. Known: multiple, pivot"):
        make_method("welore", {"threshold": 0.1})
    with pytest.raises(LayershareError, match="plans by what it measures"):
        plan_with(evidence.spec, "welore", make_method("welore"), 0.5, "targets")
    with pytest.raises(LayershareError, match="keep leaves no rank"):
        planned(evidence, 0.01)


def test_a_refit_measures_what_the_method_does_not(tmp_path, tokenizer, words):
    made: dict[str, Any] = {"method": "welore", "keep": 0.6, "of": "targets", "text": words, "blocks": 24, "length": 32}
    layershare.compress(tiny_model("llama"), tokenizer, **made, refit=True, folder=tmp_path / "small")
    results = json.loads((tmp_path / "small" / "results.json").read_text())
    assert results["refit"]
    assert set(results["seconds"]) == {"plan", "solve", "refit", "write"}
