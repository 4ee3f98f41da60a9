"""Every method at every size on small models: runs what has no result yet. Interrupted, the same command continues.

    python -m benchmarks.methods.run [--path c4=FILE] [--path books-llama-11m=FOLDER …]

`matrix.yaml`, or another one (--matrix), says what to run. `results.jsonl` has a line for each experiment,
MODEL/METHOD-KEEP. It runs in a fresh process; the statistics are measured once per model. `make tables` puts the
results into docs/.
"""

import argparse
import fcntl
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from transformers.utils import logging

from benchmarks.paths import add_path, is_here, paths_of
from benchmarks.results import Results
from layershare.api import evaluate_folder
from layershare.errors import LayershareError, unknown
from layershare.methods import METHODS
from layershare.model.arch import Spec
from layershare.model.describe import describe
from layershare.model.source import read_config, resolve
from layershare.model.weights import Weights
from layershare.plan.budget import target_parameters
from layershare.recipe import make_recipe
from layershare.report.results import environment
from layershare.run import calibrate_to, run
from layershare.store import as_json

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
Values = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """One method at one size on one model: a recipe, what else to measure, and the weights that it is about."""

    method: str
    keep: float
    recipe: Values
    further_tests: list[Values]
    model_fingerprint: str

    @property
    def name(self) -> str:
        """The name of the result."""
        return f"{self.recipe['model']}/{self.method}-{self.keep}"

    @property
    def identity(self) -> Values:
        """What a result must have been made from to be this experiment's."""
        return json.loads(json.dumps(vars(self)))


@dataclass(frozen=True)
class Place:
    """Where names lead to, where results and unfinished work are, and the threads of each process."""

    paths: dict[str, str]
    results: Results
    work: Path
    threads: int

    def named(self, recipe: Values) -> Values:
        """A recipe with paths in place of the names that have one."""
        values = {**recipe, "model": self.paths.get(recipe["model"], recipe["model"])}
        for section, keys in (("calibration", ("text",)), ("evaluation", ("text", "tasks_data"))):
            if values.get(section):
                found = {key: self.paths.get(values[section].get(key), values[section].get(key)) for key in keys}
                values[section] = {**values[section], **found}
        values["calibration"] = {**values["calibration"], "stats": str(self.stats(recipe["model"]))}
        return values

    def stats(self, model: str) -> Path:
        """The statistics of a model, shared by all its experiments."""
        return self.work / model / "stats"

    def finished(self, name: str, identity: Values) -> bool:
        """Whether an experiment has a result that was made from the same."""
        return self.results.read().get(name, {}).get("experiment") == identity


def asked_place(description: str | None, results: Results) -> Place:
    """What the command line of a simple bench says: `--path` and `--work`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_path(parser)
    work = Path("build") / results.file.parent.name
    parser.add_argument("--work", type=Path, default=work, help="folder of unfinished work")
    options = parser.parse_args()
    return Place(paths_of(options.path), results, options.work, 1)


def experiments(matrix: Values, model: str, methods: list[str], place: Place) -> list[Experiment]:
    """All experiments on one model, size by size: of these methods, or of what the matrix has in their place.

    A model may have `methods` and `keeps` of its own, some of those.
    """
    row = matrix["models"][model]
    folder = resolve(place.paths.get(model, model))
    spec = describe(read_config(folder))
    with TemporaryDirectory() as scratch:
        fingerprint = Weights.open(folder, Path(scratch), dtype="auto", device="cpu").fingerprint
    found, every = [], matrix.get("methods", {name: {"method": name} for name in methods})
    for keep in row.get("keeps", matrix["keeps"]):
        first, *further = row["tests"]
        tasks = row.get("tasks")
        if tasks and keep in tasks["keeps"] and tasks["data"] in place.paths:
            first = {**first, "tasks": tasks["names"], "tasks_data": tasks["data"], "limit": tasks["limit"]}
        for method in row.get("methods", every):
            recipe = {
                "model": model,
                **every[method],
                "keep": budget(spec, keep),
                "of": "all",
                "calibration": row["calibration"],
                "evaluation": first,
            }
            found.append(Experiment(method, keep, recipe, further, fingerprint))
    return found


def budget(spec: Spec, keep: float) -> str:
    """All parameters that are left when this fraction of the targets is, exactly, as a recipe says it."""
    targets = target_parameters(spec)
    count = spec.parameters - targets + floor(Fraction(str(keep)) * targets)
    return f"{count // 1000}.{count % 1000:03}K"


def carry_out(experiment: Experiment, place: Place) -> None:
    """In the fresh process: run the recipe, measure on all texts, write the result, drop the model."""
    name = experiment.name
    recipe = place.named(experiment.recipe)
    out = place.work / name

    def work() -> Values:
        try:
            results = as_json(run(make_recipe({**recipe, "evaluation": None}), out, pages=False))
        except LayershareError as error:
            return {"refused": str(error)}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        measured = []
        for test in (experiment.recipe["evaluation"], *experiment.further_tests):
            asked = make_recipe(place.named({**experiment.recipe, "evaluation": test}))
            measured.append(as_json(evaluate_folder(str(out), recipe["model"], asked).evaluation))
            measured[-1]["text"]["source"] = test["text"]  # the name, not that of a file here
        if results["calibration"]:
            results["calibration"]["source"] = experiment.recipe["calibration"]["text"]
        wanted = ("before", "after", "options", "calibration", "refit", "seconds")
        return {**{key: results[key] for key in wanted}, "peak_memory": peak, "evaluations": measured}

    _write_result(name, experiment.identity, place, work)
    shutil.rmtree(out, ignore_errors=True)


def calibrate(experiment: Experiment, place: Place) -> None:
    """In the fresh process: measure the statistics that all experiments of a model share."""
    model = experiment.recipe["model"]
    recipe = make_recipe({**place.named(experiment.recipe), "method": "svd-llm", "evaluation": None})

    def work() -> Values:
        start = time.perf_counter()
        calibrate_to(recipe)
        seconds = round(time.perf_counter() - start, 3)
        return {"seconds": seconds, "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    _write_result(f"{model}/calibration", calibration_identity(experiment), place, work)


def calibration_identity(experiment: Experiment) -> Values:
    """What the statistics of a model are made from."""
    return {"calibration": experiment.recipe["calibration"], "model_fingerprint": experiment.model_fingerprint}


def _write_result(name: str, identity: Values, place: Place, work: Callable[[], Values]) -> None:
    """Do the work and write its result, unless a process that outlived its parent has just done so."""
    torch.set_num_threads(place.threads)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".* holds this very run, finished")
    (place.work / name).parent.mkdir(parents=True, exist_ok=True)
    with open(place.work / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.finished(name, identity):
            return
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {"memory_at_start": start, **work()}
        found["cpu_seconds"] = round(time.process_time(), 1)  # of everything, measuring included
        place.results.put(name, {"experiment": identity, **found, **environment()})


def in_fresh_process(
    context: ForkServerContext, function: Callable[[Experiment, Place], None], experiment: Experiment, place: Place
) -> bool:
    """Whether the function ended well. A process dies without taking others with it."""
    process = context.Process(target=function, args=(experiment, place), daemon=True)
    start = time.perf_counter()
    process.start()
    process.join()
    what = "statistics" if function is calibrate else f"{experiment.method}, {experiment.keep}"
    how = "done" if process.exitcode == 0 else f"failed with exit code {process.exitcode}"
    print(f"{experiment.recipe['model']}: {what}: {how} in {time.perf_counter() - start:.1f} s", flush=True)
    return process.exitcode == 0


def run_pending(context: ForkServerContext, todo: list[Experiment], place: Place, jobs: int) -> bool:
    """Calibrate once, then run the experiments of one model, `jobs` at a time; whether all ended well."""
    first = todo[0]
    model = first.recipe["model"]
    if not place.finished(f"{model}/calibration", calibration_identity(first)):
        shutil.rmtree(place.stats(model), ignore_errors=True)  # so that its seconds are those of all the work
    if not in_fresh_process(context, calibrate, first, place):
        return False
    with ThreadPoolExecutor(jobs) as pool:
        return all(list(pool.map(lambda each: in_fresh_process(context, carry_out, each, place), todo)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_path(parser)
    parser.add_argument("--matrix", type=Path, default=HERE / "matrix.yaml", help="what to run")
    parser.add_argument("--method", action="append", default=[], help="run this method only; repeatable")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="folder of unfinished work")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="experiments at a time")
    options = parser.parse_args()
    paths = paths_of(options.path)
    for method in options.method:
        if method not in METHODS:
            sys.exit(str(unknown("method", method, METHODS)))
    threads = max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // options.jobs))
    place = Place(paths, Results(options.results), options.work, threads)
    matrix = yaml.safe_load(options.matrix.read_text(encoding="utf-8"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["layershare.api", "layershare.run"])
    well = True
    for model in matrix["models"]:
        if not is_here(model, paths):
            continue
        every = experiments(matrix, model, options.method or list(METHODS), place)
        todo = [each for each in every if not place.finished(each.name, each.identity)]
        print(f"{model}: {len(todo)} of {len(every)} experiments to run", flush=True)
        if todo:
            well = run_pending(context, todo, place, options.jobs) and well
    if not well:
        sys.exit("Some experiments failed; the same command tries them again.")


if __name__ == "__main__":
    main()
