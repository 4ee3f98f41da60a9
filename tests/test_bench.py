"""The comparison of methods: what runs, what it writes, that it continues, and the tables made from it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from scripts.method_tables import measured_method, model_page
from tests.families import tiny_model

RUN = Path(__file__).parents[1] / "benchmarks" / "methods" / "run.py"
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
def bench(tmp_path_factory, tokenizer, words) -> tuple[Path, str]:
    """A folder with results of a bench that was killed after its first result, and what the second try printed."""
    folder = tmp_path_factory.mktemp("bench")
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "letters.txt").write_text("\n".join(words))
    (folder / "matrix.yaml").write_text(yaml.safe_dump(MATRIX))
    command = [sys.executable, RUN, "--matrix", "matrix.yaml", "--results", "results", "--jobs", "1"]
    command += ["--method", "svd", "--method", "svd-llm", "--path", "tiny=model", "--path", "letters=letters.txt"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=folder, env=one_thread, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as first:
        while first.poll() is None and not results_of(folder):
            time.sleep(0.05)
        assert first.poll() is None
        first.kill()
    again = subprocess.run(command, cwd=folder, env=one_thread, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    return folder, again.stdout


def results_of(folder: Path) -> dict[str, dict]:
    files = sorted((folder / "results" / "tiny").glob("*-*/result.json"))
    return {file.parent.name: json.loads(file.read_text()) for file in files}


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
    written = yaml.safe_load((folder / "results" / "tiny" / "svd-llm-0.8" / "recipe.yaml").read_text())
    assert written == results["svd-llm-0.8"]["experiment"]["recipe"]
    assert (written["model"], written["calibration"]["text"]) == ("tiny", "letters")


def test_tables_show_results_and_mark_what_is_off_size(bench, tmp_path):
    results = results_of(bench[0])
    page = model_page(bench[0] / "results", "tiny")
    for name, result in results.items():
        method = name.rpartition("-")[0]
        perplexity = f"{result['evaluations'][0]['perplexity']['value']:.4g}"
        assert any(line.startswith(f"| {method} |") and perplexity in line for line in page.splitlines())
    assert "†" not in page
    assert "| tiny, stdlib |" in measured_method(bench[0] / "results", "svd")
    assert measured_method(bench[0] / "results", "basis-sharing").startswith("Not measured yet")

    facts = {key: results["svd-llm-0.8"][key] for key in ("experiment", "date", "machine", "versions")}
    results["svd-0.8"]["after"]["all"]["parameters"] *= 0.99
    changed = {"svd-0.8": results["svd-0.8"], "svd-llm-0.8": {**facts, "refused": "No."}}
    for name, result in {**changed, "calibration": {"seconds": 1}}.items():
        (tmp_path / "tiny" / name).mkdir(parents=True)
        (tmp_path / "tiny" / name / "result.json").write_text(json.dumps(result))
    page = model_page(tmp_path, "tiny")
    assert [line for line in page.splitlines() if line.startswith("| svd |") and line.endswith(" † |")]
    assert [line for line in page.splitlines() if line.startswith("| svd-llm |") and line.endswith("| refused |")]
    assert "- svd-llm: No." in page

    (tmp_path / "tiny" / "svd-llm-0.8" / "result.json").write_text(json.dumps(results["svd-llm-0.8"]))
    results["svd-0.8"]["evaluations"][1]["text"]["tokens_sha256"] = "another"
    (tmp_path / "tiny" / "svd-0.8" / "result.json").write_text(json.dumps(results["svd-0.8"]))
    with pytest.raises(ValueError, match="different test texts"):
        model_page(tmp_path, "tiny")
