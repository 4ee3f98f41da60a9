"""What bytes buy: fewer bits for each number, fewer numbers by `auto`, or both. Writes results.jsonl beside this file.

    python -m benchmarks.bytes.run [--path books-llama-11m=FOLDER --path novels=FILE …]

`matrix.yaml` says what to measure; quantizing is GPTQ's, in groups of 64, on the text that `auto` sees. Bytes are those
of the matrices in the blocks. What has a result is not measured again. 20 minutes for the sample model on a slow core.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import yaml

from benchmarks.methods.run import Place
from benchmarks.paths import add_path, is_here, paths_of
from benchmarks.results import Results
from layershare.api import evaluate_folder
from layershare.model.describe import describe
from layershare.model.source import read_config
from layershare.plan.budget import measure as sizes_of
from layershare.quantizing import quantize_folder
from layershare.recipe import make_recipe
from layershare.report.results import environment
from layershare.run import run
from layershare.store import as_json

HERE = Path(__file__).parent
DENSE = 16
"""Bits of a number that is not quantized."""


def measure(model: str, row: dict[str, Any], keep: float, precisions: list[int | list[int]], place: Place) -> None:
    """Measure one model at one size, at all its precisions that have no result yet."""
    recipe = {"model": model, "method": "auto", "keep": keep, "of": "targets", **row.get("settings", {})}
    recipe |= {"options": {"compare": False}, "calibration": row["calibration"], "evaluation": row["test"]}
    todo = {}
    for each in precisions:
        bits, basis_bits = each if isinstance(each, list) else (each, each)
        how, name = {"recipe": recipe, "bits": bits, "basis_bits": basis_bits}, f"{model}/{keep}-{bits}-{basis_bits}"
        if not place.finished(name, how):
            todo[name] = how
    if not todo:
        return
    settings = make_recipe(place.named(recipe))
    original, folder, sizes = settings.model, settings.model, sizes_of(describe(read_config(settings.model)), ())
    if keep < 1:
        folder = str(place.work / model / f"{keep}")
        sizes = run(make_recipe({**place.named(recipe), "evaluation": None}), folder, pages=False).after
    for name, how in todo.items():
        out, size, precision = folder, sizes.targets.bytes, {key: how[key] for key in ("bits", "basis_bits")}
        if how["bits"] < DENSE:
            out = str(place.work / name)
            shutil.rmtree(out, ignore_errors=True)  # of an earlier matrix
            size = quantize_folder(folder, out, calibration=settings.calibration, **precision).after
        evaluation = as_json(evaluate_folder(out, original, settings).evaluation)
        evaluation["text"]["source"] = row["test"]["text"]
        found = {"keep": keep, **precision, "bytes": size, "evaluation": evaluation}
        place.results.put(name, {"experiment": how, **found, **environment()})
        print(name, flush=True)


def main() -> None:
    """Measure everything whose models and texts are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_path(parser)
    parser.add_argument("--work", type=Path, default=Path("build/bytes"), help="folder of unfinished work")
    options = parser.parse_args()
    paths = paths_of(options.path)
    place = Place(paths, Results(HERE / "results.jsonl"), options.work, 1)
    matrix = yaml.safe_load((HERE / "matrix.yaml").read_text(encoding="utf-8"))
    for model, row in matrix["models"].items():
        if not is_here(model, paths):
            continue
        for keep, precisions in matrix["keeps"].items():
            measure(model, row, keep, precisions, place)


if __name__ == "__main__":
    main()
