"""Zero-shot tasks on the models of README's first table: what compression leaves of more than perplexity.

    python -m benchmarks.tasks.run --path zeroshot=FOLDER --path SmolLM2-135M=FOLDER --path c4-train=FILE …

`zeroshot` is a folder with a `TASK.jsonl` for each task. The recipes are those of benchmarks/first, without their
evaluation; `MEASURED` says which are looked at. `results.jsonl` has a line for each model and one for the original.
A quarter of an hour to half an hour each, on one core.
"""

import shutil
from pathlib import Path

import yaml

from benchmarks.methods.run import HERE as METHODS
from benchmarks.methods.run import Values, asked_place, experiments
from benchmarks.paths import is_here
from benchmarks.results import Results
from layershare.api import evaluate_folder
from layershare.recipe import make_recipe
from layershare.report.results import environment
from layershare.run import run
from layershare.store import as_json

RESULTS = Results(Path(__file__).parent / "results.jsonl")
MATRIX = METHODS.parent / "first" / "matrix.yaml"
MODEL = "SmolLM2-135M"
"""The smallest model that is better at these tasks than guessing."""
MEASURED = [
    ("auto without refit", 0.8),
    ("auto without refit", 0.6),
    ("svd-llm", 0.8),
    ("shortgpt", 0.8),
]
TASKS = {
    "tasks": ["openbookqa", "winogrande", "piqa", "mathqa", "arc_easy", "arc_challenge"],
    "tasks_data": "zeroshot",
    "limit": 200,
    "dtype": "float32",
    "batch_size": 8,
}


def main() -> None:
    """Measure the original, then compress and measure one model after the other."""
    place = asked_place(__doc__, RESULTS)
    if not is_here(MODEL, place.paths):
        return
    matrix = yaml.safe_load(MATRIX.read_text(encoding="utf-8"))
    found = {(each.method, each.keep): each for each in experiments(matrix, MODEL, [], place)}
    fingerprint = next(iter(found.values())).model_fingerprint
    asked = make_recipe(place.named({"model": MODEL, "calibration": {}, "evaluation": TASKS}))

    def measured(name: str, identity: Values, folder: str) -> None:
        values = as_json(evaluate_folder(folder, None, asked).evaluation)
        place.results.put(name, {"experiment": identity, "tasks": values["tasks"], **environment()})
        print(name, {task: each["scores"]["acc"]["value"] for task, each in values["tasks"].items()}, flush=True)

    identity = {"tasks": TASKS, "model_fingerprint": fingerprint}
    if not place.finished(f"{MODEL}/original", identity):
        measured(f"{MODEL}/original", identity, place.paths[MODEL])
    for each in (found[key] for key in MEASURED):
        recipe = {**each.recipe, "evaluation": None}
        identity = {"tasks": TASKS, "model_fingerprint": fingerprint, "recipe": recipe}
        if place.finished(each.name, identity):
            continue
        run(make_recipe(place.named(recipe)), place.work / each.name, pages=False)
        measured(each.name, identity, str(place.work / each.name))
        shutil.rmtree(place.work / each.name)


if __name__ == "__main__":
    main()
