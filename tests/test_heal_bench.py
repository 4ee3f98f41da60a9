"""The experiments on training after compression: their settings are valid, they run, and they continue."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from benchmarks.results import Results
from layershare.healing.settings import Healing
from layershare.methods import make_method
from layershare.recipe import make_as, make_recipe
from tests.families import tiny_model

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
SMALL = {"text": "letters", "blocks": 4, "length": 32}
MATRIX = {
    "models": {
        "tiny": {"calibration": {**SMALL, "blocks": 16}, "training": {"text": {"text": "letters"}}, "evaluation": SMALL}
    },
    "compressions": {"svd-70": {"method": "svd", "keep": 0.7, "of": "targets"}},
    "training": {"text": {"length": 32, "tokens": 256, "held_out": 2}, "batch_size": 4},
    "healings": {
        "norms": {
            "of": ["svd-70"],
            "seeds": {"svd-70": [0, 1]},
            "settings": {"train": "norms", "loss": {"kind": "distill"}, "precision": "float32"},
        }
    },
}


def test_every_experiment_of_the_matrix_is_valid():
    matrix = yaml.safe_load((ROOT / "benchmarks" / "heal" / "matrix.yaml").read_text())
    for values in matrix["compressions"].values():
        recipe = make_recipe({"model": "sample", **values})
        make_method(recipe.method, recipe.options)
    for values in matrix["healings"].values():
        assert set(values["of"]) <= set(matrix["compressions"])
        make_as(Healing, {"model": "sample", **values["settings"]})


def test_experiments_run_and_are_not_run_again(tmp_path, tokenizer, words, commands):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "letters.txt").write_text("\n".join(words))
    (tmp_path / "matrix.yaml").write_text(yaml.safe_dump(MATRIX))
    command = [str(commands / "python"), "-m", "benchmarks.heal.run", "--matrix", "matrix.yaml"]
    command += ["--results", "results.jsonl", "--jobs", "1"]
    command += ["--path", "tiny=model", "--path", "letters=letters.txt"]

    def printed() -> str:
        done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "tiny: 3 of 3 experiments to run" in printed()
    files = {name.rpartition("/")[2]: result for name, result in Results(tmp_path / "results.jsonl").read().items()}
    assert set(files) == {"original", "compressed", "norms-0", "norms-1"}
    bare, first, second = files["compressed"], files["norms-0"], files["norms-1"]
    assert first["tokens"] == 256
    assert files["original"]["text"]["tokens_sha256"] == first["text"]["tokens_sha256"]
    assert files["original"]["held_out_perplexity"] < first["log"][0]["held_out_perplexity"]
    assert first["evaluation"]["before"]["kl"] == bare["evaluation"]["kl"] > first["evaluation"]["after"]["kl"]
    assert first["after"] == second["after"] == bare["after"]
    assert str(tmp_path) not in json.dumps(files)
    assert "tiny: 0 of 3 experiments to run" in printed()


def test_speed_is_measured_once(tmp_path, commands):
    command = [
        str(commands / "python"),
        "-m",
        "benchmarks.heal.speed",
        "--shape",
        "tiny",
        "--length",
        "32",
        "--rows",
        "2",
        "--steps",
        "2",
    ]
    command += ["--only", "deltas", "--results", "speed.json", "--work", "work"]
    for printed in (True, False):
        done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert ("delta, deltas: " in done.stdout) == printed
    assert (tmp_path / "work" / "tiny" / "delta").is_dir()  # another shape has models of its own
    found = json.loads((tmp_path / "speed.json").read_text())["trainings"]["delta, deltas"]
    assert found["tokens_per_second"] > 0
    assert 0 < found["trained"] < found["parameters"]
