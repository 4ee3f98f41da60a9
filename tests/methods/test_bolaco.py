import sys

import pytest
import torch

from layershare.errors import LayershareError
from layershare.methods.bolaco import at_ratios, scaled
from layershare.methods.probe import Probe
from layershare.model.describe import describe
from layershare.plan.budget import allowed, measure, parse_keep
from layershare.plan.edits import Share
from tests.families import CONFIGS, tiny_model
from tests.methods.known import edits_of

SPEC = describe(CONFIGS["llama"]())


def test_ratios_are_scaled_to_what_is_available():
    generator = torch.Generator().manual_seed(0)
    for available in (1, 300, 900, 1400, 1500):
        wanted = (0.2 + 0.8 * torch.rand(5, generator=generator)).tolist()
        sizes = [100, 200, 300, 400, 500]
        ratios = scaled(wanted, sizes, available)
        assert sum(r * p for r, p in zip(ratios, sizes, strict=True)) == pytest.approx(available)
        t = max(r / x for r, x in zip(ratios, wanted, strict=True))
        assert ratios == pytest.approx([min(1.0, t * x) for x in wanted])


def test_equal_wishes_beyond_what_there_is_leave_all_dense():
    assert scaled([0.5, 0.5], [10, 10], 20) == [1, 1]


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8, 0.95])
def test_an_allocation_uses_the_budget_and_leaves_v_dense(keep):
    budget = allowed(SPEC, parse_keep(keep), "targets")
    wanted = {x: 0.2 if x.role == "o" else 1.0 for x in SPEC.linears if x.role != "v"}
    shares = at_ratios(SPEC, budget, wanted)
    assert 0.995 * budget.parameters <= measure(SPEC, shares).targets.parameters <= budget.parameters
    assert "v" not in {share.roles[0] for share in shares}
    ratio = {share.roles[0]: share.rank * (x.d_in + x.d_out) / x.parameters for share in shares
             for x in [SPEC.linear(*share.places[0])]}  # fmt: skip
    assert ratio["o"] < 0.6 * ratio.get("q", 1)


def test_the_search_repeats_and_is_no_worse_than_equal_ratios(evidence):
    measured = evidence(tiny_model("llama"))
    options = {
        "trials": 12,
        "samples": 2,
        "segments": 2,
    }  # the first ten are random, then the Gaussian process proposes
    first = edits_of(measured, "bolaco", 0.6, **options)
    assert first == edits_of(measured, "bolaco", 0.6, **options)
    equal = edits_of(measured, "bolaco", 0.6, trials=1, samples=2)
    probe = Probe(measured, 2)
    losses = []
    for edits in (first, equal):
        replaced = {}
        for edit in edits:
            assert isinstance(edit, Share)
            linear = SPEC.linear(*edit.places[0])
            weight, gram = measured.weight(linear).double(), measured.gram(linear).double()
            _, axes = torch.linalg.eigh(weight.T @ gram @ weight)
            top = axes[:, -edit.rank :]  # W′ = WV_kV_kᵀ
            replaced[SPEC.weight_name(linear)] = (weight @ top @ top.T).T.float()
        losses.append(probe.loss(replaced))
    assert losses[0] <= losses[1] + 1e-4
    assert losses[0] != losses[1]


def test_without_the_optimiser_one_sentence_says_what_to_install(evidence, monkeypatch):
    measured = evidence(tiny_model("llama"))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(LayershareError, match=r"pip install '\.\[search\]'"):
        edits_of(measured, "bolaco", 0.6)


@pytest.mark.parametrize(("keep", "options", "message"), [(0.05, {}, "keep more"), (0.6, {"segments": 5}, "4 layers")])
def test_what_cannot_be_met_is_refused(keep, options, message, evidence):
    with pytest.raises(LayershareError, match=message):
        edits_of(evidence(tiny_model("llama")), "bolaco", keep, trials=1, **options)
