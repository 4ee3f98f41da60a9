"""The comparison of methods: what runs, what it writes, that it continues, and the tables made from it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from benchmarks.methods.tables import measured_method, model_page
from benchmarks.results import CURVE, Results, thinned
from tests.families import tiny_model

ROOT = Path(__file__).parents[1]
MATRIX = {
    "keeps": [0.8],
    "models": {
        "tiny": {
            "calibration": {"text": "letters", "blocks": 32, "length": 64},
            "tests": [{"text": "stdlib", "blocks": 2, "length": 64}, {"text": "letters", "blocks": 4, "length": 32}],
        },
        "elsewhere": {"calibration": {"text": "letters"}, "tests": [{"text": "letters"}]},
    },
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tokenizer, words, commands) -> tuple[Path, str]:
    """A folder with results of a bench that was killed after its first result, and what the second try printed."""
    folder = tmp_path_factory.mktemp("bench")
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "letters.txt").write_text("\n".join(words))
    (folder / "matrix.yaml").write_text(yaml.safe_dump(MATRIX))
    command = [str(commands / "python"), "-m", "benchmarks.methods.run", "--matrix", "matrix.yaml"]
    command += ["--results", "results.jsonl", "--jobs", "1"]
    command += ["--method", "svd", "--method", "svd-llm", "--path", "tiny=model", "--path", "letters=letters.txt"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as first:
        while first.poll() is None and not results_of(folder):
            time.sleep(0.05)
        assert first.poll() is None
        first.kill()
    again = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    return folder, again.stdout


def results_of(folder: Path) -> dict[str, dict]:
    every = Results(folder / "results.jsonl").read()
    return {name.partition("/")[2]: result for name, result in every.items() if not name.endswith("/calibration")}


def test_a_killed_bench_continues(bench):
    folder, printed = bench
    assert "elsewhere: left out; say where it is with --path elsewhere=FOLDER" in printed
    assert "2 of 2" not in printed
    assert "of 2 experiments to run" in printed
    results = results_of(folder)
    assert set(results) == {"svd-0.8", "svd-llm-0.8"}
    assert not list((folder / "build").rglob("config.json"))  # compressed models are not kept


def test_results_are_comparable_and_complete(bench):
    folder, _ = bench
    results = results_of(folder)
    for result in results.values():
        first, second = result["evaluations"]
        assert (first["text"]["source"], second["text"]["source"]) == ("stdlib", "letters")
        assert first["kl"] > 0
        assert second["top1_agreement"] <= 1
        assert {"all", "targets"} == set(result["after"])
        assert result["after"]["all"]["multiplications"] < result["before"]["all"]["multiplications"]
        assert result["peak_memory"] >= result["memory_at_start"] > 0
        assert result["versions"]["torch"]
        assert str(folder) not in json.dumps(result)
    assert results["svd-0.8"]["after"] == results["svd-llm-0.8"]["after"]
    written = results["svd-llm-0.8"]["experiment"]["recipe"]
    assert (written["model"], written["calibration"]["text"]) == ("tiny", "letters")


def test_tables_show_results_and_mark_what_is_off_size(bench, tmp_path):
    results = results_of(bench[0])
    every = Results(bench[0] / "results.jsonl")
    page = model_page(every, "tiny")
    for name, result in results.items():
        method = name.rpartition("-")[0]
        perplexity = f"{result['evaluations'][0]['perplexity']['value']:.4g}"
        assert any(line.startswith(f"| {method} |") and perplexity in line for line in page.splitlines())
    assert "†" not in page
    assert "| tiny, stdlib |" in measured_method(every, "svd")
    assert measured_method(every, "basis-sharing").startswith("Not measured yet")

    facts = {key: results["svd-llm-0.8"][key] for key in ("experiment", "date", "machine", "versions")}
    results["svd-0.8"]["after"]["all"]["parameters"] *= 0.99
    changed = {"svd-0.8": results["svd-0.8"], "svd-llm-0.8": {**facts, "refused": "No."}}
    calibration = {"experiment": {}, "seconds": 1, **{key: facts[key] for key in ("versions", "machine")}}
    every = Results(tmp_path / "results.jsonl")
    every.write({f"tiny/{name}": result for name, result in {**changed, "calibration": calibration}.items()})
    page = model_page(every, "tiny")
    assert [line for line in page.splitlines() if line.startswith("| svd |") and line.endswith(" † |")]
    assert [line for line in page.splitlines() if line.startswith("| svd-llm |") and line.endswith("| refused |")]
    assert "- svd-llm: No." in page

    every.put("tiny/svd-llm-0.8", results["svd-llm-0.8"])
    results["svd-0.8"]["evaluations"][1]["text"]["tokens_sha256"] = "another"
    every.put("tiny/svd-0.8", results["svd-0.8"])
    with pytest.raises(ValueError, match="different test texts"):
        model_page(every, "tiny")


def test_environments_stand_once_and_come_back(tmp_path):
    first, second = ({"versions": {"torch": version}, "machine": {"cores": 2}} for version in ("2", "3"))
    every = Results(tmp_path / "results.jsonl")
    for name, environment in (("m/b", first), ("m/a", second), ("m/c", first)):
        every.put(name, {"value": name, **environment})
    assert every.read() == {
        "m/a": {"value": "m/a", **second},
        "m/b": {"value": "m/b", **first},
        "m/c": {"value": "m/c", **first},
    }
    assert (tmp_path / "results.jsonl").read_text().count('"cores"') == 2


def test_a_thinned_log_keeps_its_ends():
    log = [{"step": step, "loss": 1 / (1 + step)} for step in range(100)]
    held_out = [{"step": step, "held_out_loss": 1.0} for step in (0, 50, 99)]
    kept = thinned([*log, *held_out])
    assert kept[-3:] == held_out
    assert len(kept) == CURVE + 3
    assert (kept[0], kept[CURVE - 1]) == (log[0], log[-1])
