"""What bytes buy: fewer bits a number, fewer numbers by `auto`, one after the other, or planned together.

Writes results.jsonl beside this file.

    python -m benchmarks.bytes.run [--path books-llama-11m=FOLDER --path novels=FILE …]

`matrix.yaml` says what to measure; quantizing is GPTQ's, in groups of 64, on the text that `auto` sees. Bytes are those
of the matrices in the blocks. What has a result is not measured again. 45 minutes for the sample model on a slow core.
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
from layershare.plan.edits import Quantize
from layershare.plan.plan import Plan
from layershare.quantizing import quantize_folder
from layershare.recipe import make_recipe
from layershare.report.results import environment
from layershare.run import run
from layershare.store import as_json

HERE = Path(__file__).parent
DENSE = 16
"""Bits of a number that is not quantized."""


def recipe_of(model: str, row: dict[str, Any], keep: float, options: dict[str, Any]) -> dict[str, Any]:
    """What `auto` does with a model at a size."""
    recipe = {"model": model, "method": "auto", "keep": keep, "of": "targets", **row.get("settings", {})}
    options = {"compare": False, **options}
    return recipe | {"options": options, "calibration": row["calibration"], "evaluation": row["test"]}


def measure(model: str, row: dict[str, Any], keep: float, precisions: list[int | list[int]], place: Place) -> None:
    """Measure one model at one size, at all its precisions that have no result yet."""
    recipe, todo = recipe_of(model, row, keep, {}), {}
    for each in precisions:
        bits, basis_bits = each if isinstance(each, list) else (each, each)
        how, name = {"recipe": recipe, "bits": bits, "basis_bits": basis_bits}, f"{model}/{keep}-{bits}-{basis_bits}"
        if not place.finished(name, how):
            todo[name] = how
    if not todo:
        return
    settings = make_recipe(place.named(recipe))
    folder, sizes = settings.model, sizes_of(describe(read_config(settings.model)), ())
    if keep < 1:
        folder = str(place.work / model / f"{keep}")
        sizes = run(make_recipe({**place.named(recipe), "evaluation": None}), folder, pages=False).after
    for name, how in todo.items():
        out, size, precision = folder, sizes.targets.bytes, {key: how[key] for key in ("bits", "basis_bits")}
        if how["bits"] < DENSE:
            out = str(place.work / name)
            shutil.rmtree(out, ignore_errors=True)  # of an earlier matrix
            size = quantize_folder(folder, out, calibration=settings.calibration, **precision).after
        put(name, how, {"keep": keep, **precision, "bytes": size}, out, row, place)


def measure_planned(
    model: str, row: dict[str, Any], keep: float, options: dict[str, Any], label: str, place: Place
) -> None:
    """Measure one model at one size in bytes, of which bits are planned, if it has no result yet."""
    how, name = {"recipe": recipe_of(model, row, keep, options)}, f"{model}/{label}-{keep}"
    if place.finished(name, how):
        return
    out = str(place.work / name)
    done = run(make_recipe({**place.named(how["recipe"]), "evaluation": None}), out, pages=False)
    kept = done.after.targets.parameters / done.before.targets.parameters
    edits = [edit for edit in Plan.from_file(Path(out) / "plan.json").edits if isinstance(edit, Quantize)]
    taken = sorted({bits for edit in edits for bits in (edit.bits, edit.basis_bits)})
    put(name, how, {"keep": kept, "planned": taken, "bytes": done.after.targets.bytes}, out, row, place)


def put(name: str, how: dict[str, Any], found: dict[str, Any], out: str, row: dict[str, Any], place: Place) -> None:
    """Measure what is in a folder, and note it with what was `found` before."""
    settings = make_recipe(place.named(how["recipe"]))
    evaluation = as_json(evaluate_folder(out, settings.model, settings).evaluation)
    evaluation["text"]["source"] = row["test"]["text"]
    place.results.put(name, {"experiment": how, **found, "evaluation": evaluation, **environment()})
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
        for label, planned in matrix["planned"].items():
            for keep in planned["keeps"]:
                measure_planned(model, row, keep, planned["options"], label, place)


if __name__ == "__main__":
    main()
