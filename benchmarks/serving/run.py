"""How fast compressed models are served, against their original in the same run.

    python -m benchmarks.serving.run [--engine vllm]

`matrix.yaml` says what is measured: a Llama of random weights, d = 1024, with what several methods leave of it. An
engine must be installed. `results.jsonl` has a line for each engine, method and size. Let nothing else run meanwhile.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import yaml

from benchmarks.memory.run import make_model
from benchmarks.results import Results
from layershare.api import ENGINES, bench_folder
from layershare.evaluate.speed import Workload
from layershare.recipe import make_recipe
from layershare.run import run
from layershare.store import as_json

HERE = Path(__file__).parent
RESULTS = Results(HERE / "results.jsonl")
Values = dict[str, Any]


def measure(recipe: Values, out: Path, engine: str, workload: Workload) -> Values:
    """The speed in float32 of what a recipe makes of its model, beside the model's.

    `multiplications`: those of its matrices, as a part of the model's.
    """
    made = run(make_recipe(recipe), out, pages=False)
    how = make_recipe({"model": str(out), "dtype": "float32"})
    found = as_json(bench_folder(str(out), recipe["model"], how, workload, engine))
    part = made.after.targets.multiplications / made.before.targets.multiplications
    return {**found, "model": out.name, "original": "dense", "multiplications": part}


def main() -> None:
    """Measure everything that has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, default="transformers", help="what runs the models")
    parser.add_argument("--work", type=Path, default=Path("build/serving"), help="folder of the models")
    options = parser.parse_args()
    matrix = yaml.safe_load((HERE / "matrix.yaml").read_text(encoding="utf-8"))
    dense, workload = options.work / "dense", Workload(**matrix["workload"])
    if not (dense / "tokenizer_config.json").exists():  # written last
        make_model(dense, **matrix["shape"])
    for label, settings in matrix["methods"].items():
        for keep in matrix["keeps"]:
            name, out = f"{options.engine}/{label}-{keep}", options.work / f"{label}-{keep}"
            experiment = {"shape": matrix["shape"], "settings": settings, "keep": keep, "workload": matrix["workload"]}
            if RESULTS.read().get(name, {}).get("experiment") == experiment:
                continue
            found = measure(
                {"model": str(dense), "keep": keep, "of": "targets", **settings}, out, options.engine, workload
            )
            RESULTS.put(name, {"experiment": experiment, **found})
            print(name, [(rate["phase"], rate["batch"], rate["ratio"]) for rate in found["rates"]], flush=True)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
