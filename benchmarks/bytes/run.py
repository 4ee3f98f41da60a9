"""What bytes buy: fewer bits a number, fewer numbers by `auto`, one after the other, or planned together.

Writes results.jsonl beside this file.

    python -m benchmarks.bytes.run [--path books-llama-11m=FOLDER --path novels=FILE …]

`matrix.yaml` says what to measure; quantizing is GPTQ's, in groups of 64, on the text that `auto` sees. Bytes are those
of the matrices in the blocks. What has a result is not measured again. 45 minutes for the sample model on a slow core.
"""

import shutil
from pathlib import Path
from typing import Any

import yaml

from benchmarks.methods.run import Place, asked_place
from benchmarks.paths import is_here
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
Values = dict[str, Any]
DENSE = 16
"""Bits of a number that is not quantized."""


def recipe_of(model: str, row: Values, keep: float, options: Values) -> Values:
    """What `auto` does with a model at a size."""
    recipe = {"model": model, "method": "auto", "keep": keep, "of": "targets", **row.get("settings", {})}
    options = {"compare": False, **options}
    return recipe | {"options": options, "calibration": row["calibration"], "evaluation": row["test"]}


def measure(
    model: str, row: Values, keep: float, precisions: list[Any], place: Place, label: str = "", **settings: Any
) -> None:
    """Measure one model at one size, at all its precisions that have no result yet.

    `settings` of the recipe are those of what has a `label`.
    """
    recipe, todo = recipe_of(model, row, keep, {}) | settings, {}
    for each in precisions:
        precision = precision_of(each)
        how, parts = {"recipe": recipe, **precision}, (label, keep, *precision.values())
        name = f"{model}/{'-'.join(str(part) for part in parts if part)}"
        if not place.finished(name, how):
            todo[name] = how, precision
    if not todo:
        return
    made = make_recipe(place.named(recipe))
    folder, sizes = made.model, sizes_of(describe(read_config(made.model)), ())
    if keep < 1:
        folder = str(place.work / model / f"{label}{keep}")
        sizes = run(make_recipe({**place.named(recipe), "evaluation": None}), folder, pages=False).after
    for name, (how, precision) in todo.items():
        out, size = folder, sizes.targets.bytes
        if how["bits"] < DENSE:
            out = str(place.work / name)
            shutil.rmtree(out, ignore_errors=True)  # of an earlier matrix
            stored = {key: value for key, value in precision.items() if key != "rounding"}
            text = None if "rounding" in precision else made.calibration
            size = quantize_folder(folder, out, calibration=text, **stored).after
        put(name, how, {"keep": keep, "label": label, **precision, "bytes": size}, out, row, place)


def precision_of(given: int | list[int] | Values) -> Values:
    """Bits of numbers and of bases, and what else a precision of the matrix says."""
    if isinstance(given, dict):
        bits = given.get("bits", 4)
        return {"bits": bits, "basis_bits": bits, **given}
    bits, basis_bits = given if isinstance(given, list) else (given, given)
    return {"bits": bits, "basis_bits": basis_bits}


def measure_planned(model: str, row: Values, keep: float, planned: Values, label: str, place: Place) -> None:
    """Measure one model at one size in bytes, of which bits are planned, if it has no result yet."""
    recipe = recipe_of(model, row, keep, planned["options"]) | planned.get("settings", {})
    how, name = {"recipe": recipe}, f"{model}/{label}-{keep}"
    if place.finished(name, how):
        return
    out = str(place.work / name)
    done = run(make_recipe({**place.named(how["recipe"]), "evaluation": None}), out, pages=False)
    kept = done.after.targets.parameters / done.before.targets.parameters
    edits = [edit for edit in Plan.from_file(Path(out) / "plan.json").edits if isinstance(edit, Quantize)]
    taken = sorted({bits for edit in edits for bits in (edit.bits, edit.basis_bits)})
    found = {"keep": kept, "label": planned.get("label", ""), "planned": taken, "bytes": done.after.targets.bytes}
    put(name, how, found, out, row, place)


def put(name: str, how: Values, found: Values, out: str, row: Values, place: Place) -> None:
    """Measure what is in a folder, and note it with what was `found` before."""
    settings = make_recipe(place.named(how["recipe"]))
    evaluation = as_json(evaluate_folder(out, settings.model, settings).evaluation)
    evaluation["text"]["source"] = row["test"]["text"]
    place.results.put(name, {"experiment": how, **found, "evaluation": evaluation, **environment()})
    print(name, flush=True)


def main() -> None:
    """Measure everything whose models and texts are there."""
    place = asked_place(__doc__, Results(HERE / "results.jsonl"))
    matrix = yaml.safe_load((HERE / "matrix.yaml").read_text(encoding="utf-8"))
    for model, row in matrix["models"].items():
        if not is_here(model, place.paths):
            continue
        for keep, precisions in matrix["keeps"].items():
            measure(model, row, keep, precisions, place)
        refined = matrix["refined"]
        for keep, precisions in refined["keeps"].items() if model in refined["models"] else ():
            measure(model, row, keep, precisions, place, "refined", **refined["settings"])
        for label, planned in matrix["planned"].items():
            for keep in planned["keeps"] if model in planned.get("models", [model]) else ():
                measure_planned(model, row, keep, planned, label, place)


if __name__ == "__main__":
    main()
