"""Where sharing weights across layers pays: predicted for windows of layers, and measured for whole plans.

    python -m benchmarks.sharing.run [--path books-llama-11m=FOLDER --path novels=FILE …]

`matrix.yaml` says what to look at. `results.jsonl` has a line for each role and shape of window, MODEL/map/ROLE-SHAPE,
and for each plan that is carried out, MODEL/plan/KEEP-PLAN. Interrupted, the same command continues. `make tables` puts
the results into docs/sharing.md.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging

from benchmarks.paths import add_path, is_here, paths_of
from benchmarks.results import Results
from benchmarks.sharing.ground import Ground
from benchmarks.sharing.measured import Lab, adjacent, forced, offered, predicted, private
from benchmarks.sharing.windows import spread, window
from layershare.plan.edits import Share
from layershare.plan.plan import Plan
from layershare.report.results import environment

HERE = Path(__file__).parent
Values = dict[str, Any]


def shape_name(shape: Values) -> str:
    """The name of a shape of windows: `2x1` are two layers at distance 1."""
    return f"{shape['layers']}x{shape['distance']}"


def mapped(ground: Ground, matrix: Values, row: Values, role: str, shape: Values) -> list[Values]:
    """What is predicted for some windows of a role."""
    found = []
    layers_of = [linear.layer for linear in ground.spec.by_role[role]]
    for number, places in enumerate(spread(len(layers_of), shape["layers"], shape["distance"], row["windows"])):
        layers = [layers_of[place] for place in places]
        members = [ground.seen(ground.spec.linear(role, layer)) for layer in layers]
        how = {"polish": number < row["polished"], "thorough": shape in matrix["thorough"]}
        found.append({"layers": layers, **{str(x): window(members, x, **how) for x in matrix["keeps"]}})
    return found


def pending_map(ground: Ground, matrix: Values, model: str, results: Results) -> Iterator[tuple[str, Values, Any]]:
    """Name, identity and work of each row of the map that is not there yet."""
    row, there = matrix["models"][model], results.read()
    for role in ground.spec.roles:
        for shape in matrix["shapes"]:
            name = f"{model}/map/{role}-{shape_name(shape)}"
            settings = {"windows": row["windows"], "polished": row["polished"], "keeps": matrix["keeps"]}
            identity = {"role": role, **shape, **settings, **ground.identity}
            if there.get(name, {}).get("experiment") != identity:
                yield name, identity, lambda role=role, shape=shape: mapped(ground, matrix, row, role, shape)
        ground.forget()


def plans(ground: Ground, keep: float, variants: Mapping[str, Values]) -> Iterator[tuple[str, Callable[[], Plan]]]:
    """Names of plans of one size, and what makes them."""
    alone = cache(lambda: private(ground, keep))
    for name, settings in variants.items():
        if "offered" in settings:
            roles = settings.get("roles", ground.spec.roles)
            yield name, lambda settings=settings, roles=roles: offered(ground, keep, settings["offered"], roles)
        elif "forced" in settings:
            spec = ground.spec
            groups = [x for role in settings["forced"] for x in adjacent(spec.by_role[role], settings["layers"])]
            yield name, lambda groups=groups: forced(ground, alone(), groups)
        else:
            yield name, alone


def tried(lab: Lab, plan: Plan, steps: Sequence[str]) -> Values:
    """What is predicted of a plan, and KL by block of the test text, as it is solved and after each further step."""
    factored = lab.carry_out(plan)
    found: Values = {
        "parameters": plan.after.targets.parameters,
        "groups": [share.id for share in plan.edits if isinstance(share, Share) and len(share.places) > 1],
        "predicted": rounded(predicted(lab.ground, factored)),
        "kl": {"solved": [rounded(x) for x in lab.divergences(factored).tolist()]},
    }
    for step in steps:
        lab.refit(factored) if step == "refit" else lab.refine(factored)
        found["kl"][step] = [rounded(x) for x in lab.divergences(factored).tolist()]
    return found


def rounded(value: float) -> float:
    """To six digits."""
    return float(f"{value:.6g}")


def pending_plans(
    ground: Ground, matrix: Values, model: str, results: Results, work: Path
) -> Iterator[tuple[str, Values, Any]]:
    """Name, identity and work of each plan that is not measured yet."""
    lab, there, row = Lab(ground, work / model), results.read(), matrix["models"][model]
    for keep, names in row["plans"].items():
        for name, make in plans(ground, keep, {name: matrix["plans"][name] for name in names}):
            steps = row["steps"] if name in row["further"] else []
            name = f"{model}/plan/{keep}-{name}"
            identity = {"keep": keep, "steps": steps, **ground.identity}
            if there.get(name, {}).get("experiment") != identity:
                yield name, identity, lambda make=make, steps=steps: tried(lab, make(), steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_path(parser)
    parser.add_argument("--matrix", type=Path, default=HERE / "matrix.yaml", help="what to look at")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="file of the results")
    parser.add_argument("--stats", type=Path, default=Path("build/sharing/stats"), help="folder of the statistics")
    parser.add_argument("--work", type=Path, default=Path("build/sharing"), help="folder of unfinished work")
    parser.add_argument("--model", action="append", default=[], help="look at this model alone; repeatable")
    parser.add_argument("--only", choices=("map", "plan"), help="look at this alone")
    options = parser.parse_args()
    paths = paths_of(options.path)
    logging.disable_progress_bar()
    results = Results(options.results)
    matrix = yaml.safe_load(options.matrix.read_text(encoding="utf-8"))
    models: dict[str, Any] = matrix["models"]
    for model, row in models.items():
        if options.model and model not in options.model:
            continue
        if not is_here(model, paths):
            continue
        text = {**row["text"], "text": paths.get(row["text"]["text"], row["text"]["text"])}
        ground = Ground.open(paths.get(model, model), text, options.stats)
        parts = {
            "map": pending_map(ground, matrix, model, results),
            "plan": pending_plans(ground, matrix, model, results, options.work),
        }
        for name, identity, work in chain.from_iterable(parts[x] for x in parts if options.only in (None, x)):
            start = time.perf_counter()
            found = work()
            seconds = round(time.perf_counter() - start, 1)
            results.put(name, {"experiment": identity, "found": found, "seconds": seconds, **environment()})
            print(f"{name}: {seconds} s", flush=True)


if __name__ == "__main__":
    main()
