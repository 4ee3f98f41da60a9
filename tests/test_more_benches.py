"""Benches of zero-shot tasks, what runs take, distillation and serving, and which experiments matrices name."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from benchmarks.cost.run import expected
from benchmarks.heal.run import experiments as heal_experiments
from benchmarks.peers.run import experiments as peers_experiments
from benchmarks.repair.tables import distilled_page
from benchmarks.results import Results
from benchmarks.serving.run import measure as measure_serving
from benchmarks.serving.tables import serving_page
from benchmarks.tasks.tables import tasks_page
from layershare.evaluate.speed import Workload
from layershare.healing.settings import Healing
from layershare.job import prepare
from layershare.recipe import make_as, make_recipe
from tests.families import tiny_model
from tests.test_heal_bench import ENVIRONMENT
from tests.test_peers_bench import MACHINE, VERSIONS, result

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PLACE = {"machine": MACHINE, "versions": VERSIONS, "date": "2026-11-28T00:00"}


def matrix(*names: str) -> dict:
    return yaml.safe_load(BENCHMARKS.joinpath(*names).read_text())


def scores(*values: float) -> dict:
    """The results of a model in tasks."""
    tasks = {
        f"task{number}": {
            "rows": 100,
            "chance": 0.25,
            "sha256": "rows",
            "scores": {"acc": {"value": value, "stderr": 0.03}},
        }
        for number, value in enumerate(values)
    }
    return {"experiment": {"model_fingerprint": "weights"}, "tasks": tasks, **PLACE}


def test_scores_stand_beside_the_originals_and_perplexity(tmp_path):
    tasks, first = Results(tmp_path / "tasks.jsonl"), Results(tmp_path / "first.jsonl")
    assert tasks_page(tasks, first, "tiny").startswith("Not measured yet")
    tasks.put("tiny/original", scores(0.5, 0.7))
    tasks.put("tiny/auto-0.8", scores(0.4, 0.56))
    first.put("tiny/auto-0.8", result(0.8, 11.0))
    lines = tasks_page(tasks, first, "tiny").splitlines()
    assert lines[2:5] == [
        "| guessing | 0.250 | 0.250 |  |  |  |",
        "| original | 0.500 ± 0.030 | 0.700 ± 0.030 | 0.600 ± 0.021 | 100% |  |",
        "| auto, 80% kept | 0.400 ± 0.030 | 0.560 ± 0.030 | 0.480 ± 0.021 | 80% | +0.095 |",
    ]
    other = scores(0.4, 0.5)
    other["tasks"]["task0"]["sha256"] = "others"
    tasks.put("tiny/auto-0.6", other)
    with pytest.raises(ValueError, match="different rows"):
        tasks_page(tasks, first, "tiny")


def test_distilled_models_stand_beside_the_closed_form(tmp_path):
    closed, distilled = Results(tmp_path / "closed.jsonl"), Results(tmp_path / "distilled.jsonl")
    assert distilled_page(closed, distilled).startswith("Not measured yet")
    closed.put("tiny/auto-0.4", result(0.4, 20.0))
    before, after = (result(0.4, value)["evaluations"][0] | {"kl": value / 100} for value in (15.0, 12.0))
    recipe = {"keep": 0.4, "refine": {}}
    evaluation = {"before": before, "after": after}
    found = {"experiment": {"recipe": recipe}, "evaluation": evaluation, "tokens": 4096, **PLACE}
    distilled.put("tiny/refined-40/distilled-0", found)
    line = distilled_page(closed, distilled).splitlines()[2]
    assert line == "| tiny, novels | 40% | +0.6931 | +0.4055 | +0.1823 | 0.26 | 0.1500 | 0.1200 | 4,096 |"


def test_a_matrix_may_name_what_a_model_has():
    of_heal = matrix("repair", "distill.yaml")
    named = {model: {each.name for each in heal_experiments(of_heal, model)} for model in of_heal["models"]}
    trained = {"closed-80": "distilled-less-0", "closed-60": "distilled-0"}
    made = {name: ("compressed", healing) for name, healing in trained.items()}
    assert named["SmolLM2-135M"] == {f"SmolLM2-135M/{name}/{each}" for name, those in made.items() for each in those}
    assert len(named["sample"]) == 4
    for each in heal_experiments(of_heal, "sample"):
        make_recipe(each.recipe)
        if each.settings:
            make_as(Healing, {**each.settings, "model": "sample"})
    of_peers = peers_experiments(matrix("peers", "matrix.yaml"))
    labels = {(label, keep) for label, keep, how in of_peers if how["model"] == "SmolLM2-135M"}
    at_both = {(label, keep) for label in ("zs-svd, one shot", "kfac-svd, uniform ranks") for keep in (0.8, 0.6)}
    assert labels == {*at_both, ("kfac-svd, LEMS", 0.6)}


def test_larger_models_take_longer():
    shapes = matrix("cost", "matrix.yaml")["estimates"]
    told = [
        expected(prepare(make_recipe({"model": name, "keep": 0.6}), LlamaConfig(**shape)))
        for name, shape in shapes.items()
    ]
    assert told[1]["seconds"] > 5 * told[0]["seconds"]
    assert told[1]["memory"] > 2 * told[0]["memory"]


def test_what_a_run_takes_is_measured_in_a_fresh_process(tmp_path, tokenizer, words, commands):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "letters.txt").write_text("\n".join(words))
    text = {"text": "letters.txt", "blocks": 16, "length": 32}
    recipe = {"model": "model", "keep": 0.8, "calibration": text, "evaluation": {**text, "blocks": 2}}
    command = [str(commands / "python"), "-m", "benchmarks.cost.run", "--child", json.dumps(recipe), "--work", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["expected"]["seconds"] > 0
    assert {"calibrate", "plan", "solve", "compare", "refit", "write"} <= found["peaks"].keys()
    assert set(found["seconds"]) <= set(found["peaks"])
    assert found["held_out"]["kl"]["own"] > 0


def test_serving_speed_is_measured_and_told(tmp_path, tokenizer):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    results = Results(tmp_path / "results.jsonl")
    assert serving_page(results, "transformers").startswith("Not measured yet")
    workload = Workload(batches=(1, 2), prompt=4, new=2, rounds=1)
    recipe = {"model": str(tmp_path / "dense"), "method": "svd", "keep": 0.5, "of": "targets"}
    found = measure_serving(recipe, tmp_path / "small", "transformers", workload)
    assert 0.4 < found["multiplications"] < 0.55
    results.put("transformers/svd-0.5", {"experiment": {"keep": 0.5}, **found})
    header, _, line = serving_page(results, "transformers").splitlines()[:3]
    phases = ["prefill, batch 1", "decode, batch 1", "prefill, batch 2", "decode, batch 2"]
    assert header == f"|  | kept | multiplications | {' | '.join(phases)} | memory |"
    assert line.startswith("| svd | 50% | ")
    assert serving_page(results, "vllm").startswith("Not measured yet")
