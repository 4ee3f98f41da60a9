"""Write the tables and charts of README.md and docs/ anew from the results in benchmarks/.

With `--check`, fail if that changes them.

A table stands between two comments that name it: `demo`, `matrix`, `results MODEL`, `forms MODEL`, `auto MODEL`,
`peers MODEL`, `repair MODEL`, `distilled`, `first`, `tasks MODEL`, `expected`, `cost`, `heal MODEL`,
`sharing PART MODEL`, `speed`, `serving ENGINE`, `bytes MODEL`, `measured METHOD`, or, from the code, `recipe KIND` or
`options`.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.bytes.tables import bytes_chart, bytes_page
from benchmarks.cost.tables import cost_page
from benchmarks.expected.tables import expected_page
from benchmarks.heal.tables import heal_page, speed_page
from benchmarks.methods.tables import machine, markdown, measured_method, model_page, models_page, variants_page
from benchmarks.peers.tables import peers_page
from benchmarks.repair.tables import distilled_page
from benchmarks.results import Results
from benchmarks.serving.tables import serving_page
from benchmarks.sharing.tables import sharing_map, sharing_plans, sharing_ways
from benchmarks.tasks.tables import tasks_page
from scripts.method_matrix import matrix
from scripts.recipe_tables import options_page, recipe_page

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    *(f"docs/{page}.md" for page in ("methods", "results", "papers", "recipe", "sharing", "bytes", "serving")),
)
BENCHMARKS = ROOT / "benchmarks"
METHODS, FORMS, AUTO, PEERS, REPAIR, FIRST, TASKS, HEAL, SHARING, BYTES = (
    Results(BENCHMARKS / name / "results.jsonl")
    for name in ("methods", "forms", "auto", "peers", "repair", "first", "tasks", "heal", "sharing", "bytes")
)
SHARED = {"map": sharing_map, "ways": sharing_ways, "plans": sharing_plans}
GENERATED = re.compile(r"(<!-- (?P<name>.+?): made by `make tables` -->\n).*?(<!-- end of (?P=name) -->)", re.DOTALL)


def demo(results: dict[str, Any]) -> str:
    """Methods and sizes on the sample model."""
    runs = results["runs"]
    before, measured = runs[0]["before"], runs[0]["evaluation"]
    rows = [
        [
            "original",
            f"{before['all']['parameters']:,}",
            f"{measured['original_perplexity']['value']:.2f}",
            "0",
            "100 %",
        ]
    ]
    for run in runs:
        after, measured = run["after"], run["evaluation"]
        kept = after["targets"]["parameters"] / run["before"]["targets"]["parameters"]
        rows.append(
            [
                f"{run['method']}, {kept:.1%} of targets",
                f"{after['all']['parameters']:,}",
                f"{measured['perplexity']['value']:.2f}",
                f"{measured['kl']:.3f}",
                f"{measured['top1_agreement']:.1%}",
            ]
        )
    header = ["sample model", "parameters", "perplexity", "KL (nats per token)", "top-1 agreement"]
    text = runs[0]["evaluation"]["text"]
    note = f"{text['source']}, {text['blocks']} blocks of {text['length']} tokens, {runs[0]['evaluation']['dtype']}"
    return f"{markdown(header, rows)}\n\n{note}; {machine(results)}"


def table(name: str) -> str:
    """The table of this name. Raises `ValueError` if there is none."""
    kind, _, which = name.partition(" ")
    if kind == "demo":
        return demo(json.loads((BENCHMARKS / "demo" / "results.json").read_text(encoding="utf-8")))
    if kind == "matrix":
        return matrix()
    if kind == "results":
        return model_page(METHODS, which)
    if kind == "forms":
        return variants_page(FORMS, which, kind)
    if kind == "auto":
        return variants_page(AUTO, which, kind)
    if kind == "peers":
        return peers_page(PEERS, AUTO if any(name.startswith(f"{which}/") for name in AUTO.read()) else FIRST, which)
    if kind == "repair":
        return variants_page(REPAIR, which, kind)
    if kind == "distilled":
        return distilled_page(REPAIR, Results(BENCHMARKS / "repair" / "distilled.jsonl"))
    if kind == "first":
        return models_page(FIRST, kind)
    if kind == "tasks":
        return tasks_page(TASKS, FIRST, which)
    if kind == "cost":
        return cost_page()
    if kind == "expected":
        return expected_page()
    if kind == "heal":
        return heal_page(HEAL, which)
    if kind == "sharing":
        part, _, model = which.partition(" ")
        return SHARED[part](SHARING, model)
    if kind == "speed":
        return speed_page(BENCHMARKS / "heal" / "speed.json")
    if kind == "serving":
        return serving_page(Results(BENCHMARKS / "serving" / "results.jsonl"), which)
    if kind == "bytes":
        return bytes_page(BYTES, which)
    if kind == "measured":
        return measured_method(METHODS, which)
    if kind == "recipe":
        return recipe_page(which)
    if kind == "options":
        return options_page()
    raise ValueError(f"There is no table '{name}'.")


def written(text: str) -> str:
    """A page with every generated part replaced."""
    return GENERATED.sub(lambda found: f"{found[1]}{table(found['name'])}\n{found[3]}", text)


def main() -> None:
    """Write, or check."""
    models = {name.partition("/")[0] for name in BYTES.read()}
    charts = {f"docs/bytes-{model}.svg": bytes_chart(BYTES, model) for model in sorted(models)}
    for file in (*PAGES, *charts):
        place = ROOT / file
        old = place.read_text(encoding="utf-8") if place.exists() else ""
        new = charts.get(file) or written(old)
        if "--check" not in sys.argv:
            place.write_text(new, encoding="utf-8")
        elif new != old:
            sys.exit(f"{file} is not what `make tables` writes.")


if __name__ == "__main__":
    main()
