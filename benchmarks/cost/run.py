"""Time and memory of whole runs beside what was told before them, and what larger models are expected to take.

    python -m benchmarks.cost.run [--path books-llama-11m=FOLDER --path novels=FILE …]

`matrix.yaml` says what is run, each in a fresh process, whose anonymous memory is sampled as benchmarks/memory does. A
run of SmolLM2-135M takes an hour of a slow core, the others minutes. `results.jsonl` has a line for each.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig

from benchmarks.memory.run import TEXT, Sampler
from benchmarks.methods.run import Place
from benchmarks.paths import add_path, is_here, paths_of
from benchmarks.results import Results
from layershare.job import Job, prepare, speed_for
from layershare.recipe import make_recipe
from layershare.report.results import environment
from layershare.run import run
from layershare.store import as_json

HERE = Path(__file__).parent
RESULTS = Results(HERE / "results.jsonl")
UNTOLD = ("evaluate", TEXT)
"""Stages that the estimate leaves out: what measures the result, and what reads the text."""
Values = dict[str, Any]


def expected(job: Job) -> Values:
    """What `compress` tells of a job before it starts: seconds, and bytes beside what is there already."""
    speed = speed_for(job)
    return {"seconds": job.needs.work.seconds(speed), "memory": job.needs.memory, "speed": asdict(speed)}


def carry_out(recipe: Values, out: Path) -> Values:
    """In the fresh process: run the recipe under the sampler; what was told before, and what was measured."""
    told: Values = {}
    sampler = Sampler()

    def show(job: Job) -> None:
        told.update(expected(job))

    sampler.start()
    results = as_json(run(make_recipe(recipe), out, announce=sampler.announce, show=show))
    sampler.finish()
    return {
        "expected": told,
        "seconds": results["seconds"],
        "processor_seconds": sampler.processor,
        "peaks": sampler.peaks,
        **{key: results[key] for key in ("after", "refit", "evaluation", "held_out")},
    }


def in_fresh_process(recipe: Values, out: Path) -> Values:
    """Carry a recipe out where nothing has been done before."""
    command = [sys.executable, "-m", "benchmarks.cost.run", "--child", json.dumps(recipe), "--work", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    shutil.rmtree(out)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run what has no result yet, and estimate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_path(parser)
    parser.add_argument("--work", type=Path, default=Path("build/cost"), help="folder of unfinished work")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(carry_out(json.loads(options.child), options.work)))
        return
    paths = paths_of(options.path)
    place = Place(paths, RESULTS, options.work, torch.get_num_threads())
    matrix = yaml.safe_load((HERE / "matrix.yaml").read_text(encoding="utf-8"))
    for model, wanted in matrix["runs"].items():
        if place.finished(model, wanted) or not is_here(model, paths):
            continue
        recipe = place.named({"model": model, **wanted})
        del recipe["calibration"]["stats"]  # its own, measured anew
        found = in_fresh_process(recipe, place.work / model)
        found["evaluation"]["text"]["source"] = wanted["evaluation"]["text"]  # the name, not that of a file here
        place.results.put(model, {"experiment": wanted, **found, **environment()})
        print(model, found["expected"], found["seconds"], found["peaks"], flush=True)
    for model, shape in matrix["estimates"].items():
        config = LlamaConfig(**shape, max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16")
        found = expected(prepare(make_recipe({"model": model, "keep": 0.6, "of": "targets"}), config))
        place.results.put(model, {"experiment": shape, "expected": found, **environment()})
        print(model, found, flush=True)


if __name__ == "__main__":
    main()
