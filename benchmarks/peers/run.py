"""Peers' own code beside `auto`: the same model, calibration blocks, sizes and test texts as in benchmarks/auto.

    python -m benchmarks.peers.run --peer zs-svd=FOLDER … [--path books-llama-11m=FOLDER --path novels=FILE …]

A peer's code is the user's checkout of its repository; nothing of it is here. `matrix.yaml` says what to run. A peer
runs in a fresh process with a driver of ours (`driver.py`), which leaves a dense model that is measured as all others
are. `results.jsonl` has a line for each experiment, MODEL/NAME-KEEP, with the peer's commit. What has a result is not
measured again.
"""

import argparse
import json
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from benchmarks.methods.run import Place
from benchmarks.paths import add_path, is_here, paths_of
from benchmarks.peers.driver import carry_out
from benchmarks.results import Results
from layershare.api import evaluate_folder
from layershare.calibrate.text import load_text
from layershare.errors import unknown
from layershare.model.describe import describe
from layershare.model.source import read_config, read_tokenizer, resolve
from layershare.model.weights import Weights
from layershare.plan.budget import target_parameters
from layershare.recipe import make_recipe
from layershare.report.results import environment
from layershare.store import as_json

HERE = Path(__file__).parent
PEERS = ("aa-svd", "basis-sharing", "lems", "svd-llm", "zs-svd")
Values = dict[str, Any]


def commits_of(peers: dict[str, str]) -> dict[str, str]:
    """Peer -> the commit that is checked out. Exits if a peer is not known, or its folder no checkout."""
    found = {}
    for peer, folder in peers.items():
        if peer not in PEERS:
            sys.exit(str(unknown("peer", peer, PEERS)))
        git = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if git.returncode:
            sys.exit(f"'{folder}' is no git checkout; clone the repository of {peer} there.")
        found[peer] = git.stdout.strip()
    return found


def measure(name: str, how: Values, checkout: str, place: Place) -> None:
    """Have a peer compress a model to one size, measure what it left, and note it; nothing if that is done."""
    model: str = how["model"]
    calibration: Values = how["calibration"]
    original, out = resolve(place.paths.get(model, model)), place.work.absolute() / name
    with TemporaryDirectory() as scratch:
        weights = Weights.open(original, Path(scratch), dtype="auto", device="cpu")
        how = {**how, "model_fingerprint": weights.fingerprint}
    if place.finished(name, how):
        return
    source: str = calibration["text"]
    source, blocks, length = place.paths.get(source, source), calibration["blocks"], calibration["length"]
    text = load_text(source, read_tokenizer(original), split="train", blocks=blocks, length=length)
    shutil.rmtree(out, ignore_errors=True)  # of an earlier try
    given = (how["peer"], checkout, original, text.tokens, how["keep"], how["options"], out)
    process = multiprocessing.get_context("spawn").Process(target=carry_out, args=given)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{name}: the peer's code failed; what it printed is in {out / 'log.txt'}.")
    evaluations = []
    for test in how["tests"]:
        settings = make_recipe(place.named({"model": model, "calibration": calibration, "evaluation": test}))
        evaluations.append(as_json(evaluate_folder(str(out), original, settings).evaluation))
        evaluations[-1]["text"]["source"] = test["text"]  # the name, not that of a file here
    kept = json.loads((out / "kept.json").read_text(encoding="utf-8"))
    kept["of"] = target_parameters(describe(read_config(original)))
    identity = {**text.identity, "source": calibration["text"]}
    result = {"experiment": how, "kept": kept, "calibration": identity, "evaluations": evaluations}
    place.results.put(name, {**result, **environment()})
    print(f"{name}: {kept['parameters'] / kept['of']:.4f} kept in {kept['seconds']} s", flush=True)
    shutil.rmtree(out)


def experiments(matrix: Values) -> Iterator[tuple[str, float, Values]]:
    """The label of a peer's settings, a size, and how a model is compressed to it and measured."""
    for label, settings in matrix["peers"].items():
        for model, row in matrix["models"].items():
            if label in row.get("peers", matrix["peers"]):
                keeps = row.get("keeps", matrix["keeps"])
                for keep in (each for each in keeps if each in settings.get("keeps", keeps)):
                    how = {key: value for key, value in (settings | row).items() if key not in ("keeps", "peers")}
                    yield label, keep, {**how, "model": model, "keep": keep}


def main() -> None:
    """Run everything whose models, texts and peers are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER", help="where a peer's code is")
    add_path(parser)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="file of the results")
    parser.add_argument("--work", type=Path, default=Path("build/peers"), help="folder of unfinished work")
    options = parser.parse_args()
    paths, checkouts = paths_of(options.path), paths_of(options.peer)
    commits = commits_of(checkouts)
    place = Place(paths, Results(options.results), options.work, torch.get_num_threads())
    matrix = yaml.safe_load((HERE / "matrix.yaml").read_text(encoding="utf-8"))
    for label, keep, how in experiments(matrix):
        if how["peer"] in checkouts and is_here(how["model"], paths):
            how["commit"] = commits[how["peer"]]
            measure(f"{how['model']}/{label}-{keep}", how, str(Path(checkouts[how["peer"]]).absolute()), place)


if __name__ == "__main__":
    main()
