"""What `plan` expects of `auto` at every size at which it was measured.

    python -m benchmarks.expected.run [--path books-llama-11m=FOLDER --path novels=FILE …]

Models, texts and sizes are those of benchmarks/auto and benchmarks/first, whose results `tables.py` puts beside these.
`results.jsonl` has a line for each model and size. Minutes for a small model, an hour for SmolLM2-135M on a slow core.
"""

from pathlib import Path

import yaml

from benchmarks.methods.run import asked_place, experiments
from benchmarks.paths import is_here
from benchmarks.results import Results
from layershare.job import planned, prepare
from layershare.recipe import make_recipe
from layershare.report.results import environment
from layershare.run import calibrate_to

HERE = Path(__file__).parent
RESULTS = Results(HERE / "results.jsonl")
MEASURED = [HERE.parent / name for name in ("first", "auto")]
"""The benchmarks of `auto`; models that both have are taken from the second."""
METHOD = "auto without refit"
"""What they call the method whose plans are looked at: the others have the same, and refit it."""


def main() -> None:
    """Plan every model that is there at every size."""
    place = asked_place(__doc__, RESULTS)
    matrices = [yaml.safe_load((folder / "matrix.yaml").read_text(encoding="utf-8")) for folder in MEASURED]
    of_model = {model: matrix for matrix in matrices for model in matrix["models"]}
    for model, matrix in of_model.items():
        every = experiments(matrix, model, [], place) if is_here(model, place.paths) else []
        todo = [each for each in every if each.method == METHOD and not place.finished(each.name, each.identity)]
        recipes = [make_recipe({**place.named(each.recipe), "evaluation": None}) for each in todo]
        if recipes:
            calibrate_to(recipes[0], ("inputs", "gradients"))
        for each, recipe in zip(todo, recipes, strict=True):
            plan = planned(prepare(recipe), place.stats(model)).plan
            assert plan is not None
            found = {"predicted_loss": plan.predicted_loss, "expected_kl": plan.expected_kl}
            place.results.put(each.name, {"experiment": each.identity, **found, **environment()})
            print(each.name, found, flush=True)


if __name__ == "__main__":
    main()
