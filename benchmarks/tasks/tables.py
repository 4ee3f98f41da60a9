"""The table of zero-shot tasks, for docs/results.md."""

from math import hypot
from typing import Any

from benchmarks.methods.tables import added, machine, markdown, require_same
from benchmarks.results import Results

Values = dict[str, Any]
UNMEASURED = "Not measured yet; `python -m benchmarks.tasks.run` does it."


def tasks_page(tasks: Results, first: Results, model: str) -> str:
    """Accuracy by task with standard errors, the mean, what of the original's that is, and what perplexity says.

    `first` has the perplexities. Raises `ValueError` if results are of different weights or rows.
    """
    found = {name.partition("/")[2]: each for name, each in tasks.read().items() if name.startswith(f"{model}/")}
    if "original" not in found:
        return UNMEASURED
    original = found.pop("original")
    kinds = {
        "weights": {each["experiment"]["model_fingerprint"] for each in (original, *found.values())},
        "rows": {str([t["sha256"] for t in each["tasks"].values()]) for each in (original, *found.values())},
    }
    require_same(model, "`python -m benchmarks.tasks.run`", kinds)
    names, perplexities = list(original["tasks"]), first.read()
    whole, _ = _mean(original)
    rows = [["guessing", *(f"{original['tasks'][name]['chance']:.3f}" for name in names), *[""] * 3]]
    for label, each in [("original", original), *sorted(found.items(), key=lambda pair: -_mean(pair[1])[0])]:
        mean, error = _mean(each)
        cells = [_score(each["tasks"][name]["scores"]["acc"]) for name in names]
        there = perplexities.get(f"{model}/{label}")
        loss = "" if there is None else f"{added(there['evaluations'][0]):+.3f}"
        method, _, keep = label.rpartition("-")
        title = label if there is None else f"{method}, {float(keep):.0%} kept"
        rows.append([title, *cells, f"{mean:.3f} ± {error:.3f}", f"{mean / whole:.0%}", loss])
    header = ["", *names, "mean", "of the original's", "log of perplexity"]
    count = next(iter(original["tasks"].values()))["rows"]
    note = f"{model}: accuracy ± standard error, {count} rows of each task, zero-shot, by lm-eval"
    return f"{markdown(header, rows)}\n\n{note}; {machine(original)}"


def _mean(result: Values) -> tuple[float, float]:
    """The mean accuracy, and its standard error if tasks are independent."""
    scores = [task["scores"]["acc"] for task in result["tasks"].values()]
    return sum(each["value"] for each in scores) / len(scores), hypot(*(each["stderr"] for each in scores)) / len(
        scores
    )


def _score(score: Values) -> str:
    return f"{score['value']:.3f} ± {score['stderr']:.3f}"
