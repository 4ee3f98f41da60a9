"""What is chosen on text that is held out: the measure, the plan that is kept, and whether a refit is."""

import json
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from layershare.errors import LayershareError, NotFinite
from layershare.evaluate.divergence import evaluate
from layershare.job import load_and_hold_out
from layershare.methods.auto import Auto
from layershare.methods.basis_sharing import BasisSharing
from layershare.model.hub import load
from layershare.recipe import Calibration, make_recipe
from layershare.report.card import card
from layershare.report.page import page
from layershare.report.runs import Run
from layershare.run import run
from layershare.store import as_json

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")
CALIBRATION: dict[str, Any] = {"blocks": 40, "length": 32, "batch_size": 3, "held_out": 8}


def compressed(folder, words, out, **recipe: Any) -> dict[str, Any]:
    values = {"model": str(folder), "method": "auto", "keep": 0.5, "of": "targets", "calibration": CALIBRATION}
    return as_json(run(make_recipe({**values, **recipe}), out, text=words, pages=False))


def test_the_divergence_is_that_of_the_finished_model(folder, words, tokenizer, tmp_path):
    results = compressed(folder, words, tmp_path / "small", refit=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    _, held_out = load_and_hold_out(Calibration(**CALIBRATION), tokenizer, model.config, words)
    assert held_out.text_sha256 == results["held_out"]["text_sha256"]
    found = evaluate(load(tmp_path / "small"), held_out, model).kl
    assert results["held_out"]["kl"][results["held_out"]["chosen"]] == pytest.approx(found, rel=1e-3)


def test_the_plan_of_svd_llm_and_of_basis_sharing_are_solved_beside_it(folder, words, tmp_path):
    results = compressed(folder, words, tmp_path / "small", refit=False)
    found = results["held_out"]["kl"]
    assert found.keys() == {"own", "svd-llm", "basis-sharing"}
    said = f"On 8 held-out blocks of 32 tokens, KL from the original: its own plan {found['own']:.3g}, svd-llm "
    assert said in card(Run.read(tmp_path / "small", "small"))
    assert said in page([Run.read(tmp_path / "small", "small")])
    assert found[results["held_out"]["chosen"]] == min(found.values())


@pytest.mark.parametrize(("multiple", "rival"), [(8, 1), (1, 8)])
def test_the_nearest_plan_is_kept_and_its_options_are_told(multiple, rival, folder, words, tmp_path, monkeypatch):
    monkeypatch.setattr(Auto, "rivals", lambda self: {"auto": Auto(multiple=rival)})
    results = compressed(folder, words, tmp_path / "small", options={"multiple": multiple}, refit=False)
    assert results["held_out"]["chosen"] == ("own" if multiple < rival else "auto")
    plan = json.loads((tmp_path / "small" / "plan.json").read_text())
    assert plan["options"] == as_json(results["options"])
    assert plan["options"]["multiple"] == 1
    assert all(edit["rank"] % 8 == 0 for edit in plan["edits"]) is False
    assert not (tmp_path / "small" / ".run").exists()


def test_a_rival_whose_solution_overflows_is_none(folder, words, tmp_path, monkeypatch):
    """Another failure, such as a full disk, ends the run: what is compared must not depend on it."""
    error: LayershareError = LayershareError("The disk is full.")

    def fail(self, *args):
        raise error

    monkeypatch.setattr(BasisSharing, "carry_out", fail)
    with pytest.raises(LayershareError, match="The disk is full"):
        compressed(folder, words, tmp_path / "small", refit=False)
    error = NotFinite("The logits overflow.")
    results = compressed(folder, words, tmp_path / "small", refit=False)
    assert results["held_out"]["kl"].keys() == {"own", "svd-llm"}


@pytest.mark.parametrize("refit", [False, "auto"])
def test_a_plan_of_bits_is_compared_in_integers_with_bits_alone(refit, folder, words, tmp_path):
    """What is compared is what is written, after the refit, which bits alone cannot have."""
    results = compressed(folder, words, tmp_path / "small", keep=0.2, options={"bits": "2,3,8"}, refit=refit)
    found, chosen = results["held_out"]["kl"], results["held_out"]["chosen"]
    assert found.keys() == {"own", "bits alone"} | ({"refitted"} if refit else set())
    taken = "refitted" if results["refit"] else chosen
    assert found[taken] == min(found.values())
    assert results["options"]["ranks"] == (chosen == "own")
    said = f"its own plan {found['own']:.3g}"
    assert said in card(Run.read(tmp_path / "small", "small"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _, held_out = load_and_hold_out(Calibration(**CALIBRATION), tokenizer, model.config, words)
    assert evaluate(load(tmp_path / "small"), held_out, model).kl == pytest.approx(found[taken], rel=1e-3)


def test_bits_alone_are_taken_where_they_are_better(folder, words, tmp_path, monkeypatch):
    """A planner of two bits and ranks against one that has eight bits; not where training is asked for."""
    monkeypatch.setattr(Auto, "rivals", lambda self: {"bits alone": Auto(bits=(2, 8), ranks=False)})
    options = {"bits": [2]}
    results = compressed(folder, words, tmp_path / "small", keep=0.5, options=options)
    assert results["held_out"]["chosen"] == "bits alone"
    assert results["held_out"]["kl"]["bits alone"] < results["held_out"]["kl"]["own"]
    assert results["refit"] is False
    edits = json.loads((tmp_path / "small" / "plan.json").read_text())["edits"]
    assert {edit["kind"] for edit in edits} == {"quantize"}
    trained = compressed(folder, words, tmp_path / "trained", keep=0.5, options=options, effort="blocks")
    assert "bits alone" not in trained["held_out"]["kl"]


def test_where_a_plan_leaves_no_factors_nothing_is_trained(folder, words, tmp_path):
    options = {"bits": [8], "ranks": False}
    with pytest.warns(UserWarning, match="no factors that could be trained, so nothing is"):
        results = compressed(folder, words, tmp_path / "small", keep=0.6, options=options, effort="blocks")
    assert results["refine"] is None
    assert results["held_out"]["kl"].keys() == {"own"}


@pytest.mark.parametrize("refit", ["auto", True])
def test_a_refit_is_kept_where_it_helps_or_where_it_is_asked_for(refit, folder, words, tmp_path):
    # Two blocks to fit on: few enough that it may well overfit.
    few = {**CALIBRATION, "blocks": 2, "held_out": 16}
    options = {"compare": False}
    results = compressed(folder, words, tmp_path / "small", refit=refit, options=options, calibration=few)
    assert results["held_out"]["chosen"] == "own"
    if refit is True:
        assert results["refit"]
    else:
        found = results["held_out"]["kl"]
        assert results["refit"] == (found["refitted"] < found["own"])
