"""Compressed models before and after training: runs what has no result yet. Interrupted, the same command continues.

    python -m benchmarks.heal.run [--path books-llama-11m=FOLDER --path novels=FILE …]

`matrix.yaml` says what to run. `results.jsonl` has a line for each result: MODEL/COMPRESSION/compressed, and
MODEL/COMPRESSION/HEALING-SEED for each training of that model; each is made in a fresh process. MODEL/original tells
how well the original predicts the blocks that its trainings hold out. `make tables` puts all into docs/results.md.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from transformers.utils import logging

from benchmarks.paths import add_path, is_here, paths_of
from benchmarks.results import Results, thinned
from layershare.healing.heal import heal_folder
from layershare.healing.job import prepare_healing
from layershare.healing.settings import Healing
from layershare.healing.watch import held_out_loss
from layershare.model.hub import load
from layershare.model.source import resolve
from layershare.model.weights import Weights
from layershare.recipe import make_as, make_recipe
from layershare.report.results import environment
from layershare.run import run
from layershare.store import as_json

HERE = Path(__file__).parent
Values = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A compression, or the training of a compressed model with one seed, all by names of models and texts."""

    model: str
    compression: str
    recipe: Values
    healing: str | None = None
    seed: int = 0
    settings: Values | None = None

    @property
    def name(self) -> str:
        """The name of the result."""
        last = "compressed" if self.healing is None else f"{self.healing}-{self.seed}"
        return f"{self.model}/{self.compression}/{last}"


def experiments(matrix: Values, model: str) -> list[Experiment]:
    """All experiments on one model: the compressions first, of which it may name those that it has."""
    row = matrix["models"][model]
    common = {"model": model, "calibration": row["calibration"], "evaluation": row["evaluation"]}
    chosen = row.get("compressions", matrix["compressions"])
    recipes = {name: {**common, **matrix["compressions"][name]} for name in chosen}
    found = [Experiment(model, name, recipe) for name, recipe in recipes.items()]
    for healing, values in matrix["healings"].items():
        for name in (name for name in values["of"] if name in recipes):
            for seed in values.get("seeds", {}).get(name, [0]):
                settings = merged(matrix["training"], row["training"], values["settings"])
                settings |= {"teacher": model, "evaluation": row["evaluation"], "seed": seed}
                if seed:  # other blocks in another order, too
                    settings["text"] = {**settings["text"], "seed": seed}
                found.append(Experiment(model, name, recipes[name], healing, seed, settings))
    return found


def merged(*layers: Values) -> Values:
    """Settings over settings, section by section."""
    result: Values = {}
    for layer in layers:
        for key, value in layer.items():
            result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


def placed(values: Values, paths: dict[str, str]) -> Values:
    """Paths in place of the names that have one, everywhere."""
    return {
        key: placed(value, paths) if isinstance(value, dict)
        else paths.get(value, value) if key in ("model", "teacher", "text") else value
        for key, value in values.items()
    }  # fmt: skip


def fingerprint(model: str, paths: dict[str, str]) -> str:
    """Which weights a model has."""
    with TemporaryDirectory() as scratch:
        return Weights.open(resolve(paths.get(model, model)), Path(scratch), dtype="auto", device="cpu").fingerprint


def carry_out(experiment: Experiment, paths: dict[str, str], results: Results, work: Path, weights: str) -> None:
    """In the fresh process: do it, and write its result."""
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".* holds this very", UserWarning)
    compressed = work / experiment.model / experiment.compression
    start = time.perf_counter()
    if experiment.settings is None:
        made = as_json(run(make_recipe(placed(experiment.recipe, paths)), compressed, pages=False))
        wanted = ("before", "after", "options", "seconds", "evaluation")
        found = {key: made[key] for key in wanted}
    else:
        settings = {**placed(experiment.settings, paths), "model": str(compressed)}
        job = prepare_healing(make_as(Healing, settings))
        out = compressed.with_name(f"{experiment.compression}+{experiment.healing}-{experiment.seed}")
        heal_folder(job, out)
        made = json.loads((out / "results.json").read_text(encoding="utf-8"))
        wanted = ("needs", "text", "tokens_per_second", "log", "evaluation", "seconds")
        found = {"before": made["before"], "after": made["after"], **{key: made["healing"][key] for key in wanted}}
        found["log"] = thinned(found["log"])
        found["tokens"] = job.steps * job.healing.batch_size * job.text.tokens.shape[1]
        found["text"]["source"] = experiment.settings["text"]["text"]
    for each in (found["evaluation"], *(found["evaluation"].get(when, {}) for when in ("before", "after"))):
        each.pop("samples", None)
        if "text" in each:
            each["text"]["source"] = experiment.recipe["evaluation"]["text"]  # the name, not that of a file here
    found |= {"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    found |= {"wall_seconds": round(time.perf_counter() - start, 1), **environment("peft")}
    results.put(experiment.name, {"experiment": asdict(experiment), "model_fingerprint": weights, **found})


def measure_original(row: Values, common: Values, model: str, paths: dict[str, str]) -> Values:
    """Perplexity of the original on the blocks that trainings with seed 0 hold out."""
    settings = placed(merged(common, row["training"]), paths) | {"model": resolve(paths.get(model, model))}
    healing = make_as(Healing, settings | {"train": "full", "device": "cpu"})
    job = prepare_healing(healing)
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        loss = held_out_loss(load(job.folder, dtype=torch.float32), job.held_out, job.micro, torch.device("cpu"))
    text = {**job.text.identity, "source": row["training"]["text"]["text"], "held_out": healing.text.held_out}
    return {"held_out_perplexity": math.exp(loss), "text": text, **environment()}


def finished(experiment: Experiment, results: Results, weights: str) -> bool:
    """Whether there is a result that was made from the same."""
    made = results.read().get(experiment.name, {})
    same = json.loads(json.dumps(asdict(experiment)))
    return made.get("experiment") == same and made["model_fingerprint"] == weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_path(parser)
    parser.add_argument("--matrix", type=Path, default=HERE / "matrix.yaml", help="what to run")
    parser.add_argument("--only", default="", help="run experiments with this in their names")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="file of the results")
    parser.add_argument("--work", type=Path, default=Path("build/heal"), help="folder of models and unfinished work")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="experiments at a time")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in the fresh process
    options = parser.parse_args()
    paths = paths_of(options.path)
    results = Results(options.results)
    matrix = yaml.safe_load(options.matrix.read_text(encoding="utf-8"))
    if options.one:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // options.jobs)))
        model = options.one.split("/")[0]
        one = next(each for each in experiments(matrix, model) if each.name == options.one)
        carry_out(one, paths, results, options.work, fingerprint(model, paths))
        return

    def fresh(experiment: Experiment) -> bool:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.heal.run", *sys.argv[1:], "--one", experiment.name], check=False
        )
        how = "done" if done.returncode == 0 else f"failed with exit code {done.returncode}"
        print(f"{experiment.name}: {how} in {time.perf_counter() - start:.1f} s", flush=True)
        return done.returncode == 0

    well = True
    for model in matrix["models"]:
        if not is_here(model, paths):
            continue
        weights = fingerprint(model, paths)
        if (original := f"{model}/original") not in results.read():
            results.put(original, measure_original(matrix["models"][model], matrix["training"], model, paths))
        every = [each for each in experiments(matrix, model) if options.only in each.name]
        todo = [each for each in every if not finished(each, results, weights)]
        trained = {each.compression for each in todo if each.settings is not None}
        gone = {name for name in trained if not (options.work / model / name).is_dir()}
        first = [each for each in every if each.settings is None and (each in todo or each.compression in gone)]
        print(f"{model}: {len(todo)} of {len(every)} experiments to run", flush=True)
        with ThreadPoolExecutor(options.jobs) as pool:
            for group in (first, [each for each in todo if each.settings is not None]):
                well = all(list(pool.map(fresh, group))) and well
    if not well:
        sys.exit("Some experiments failed; the same command tries them again.")


if __name__ == "__main__":
    main()
