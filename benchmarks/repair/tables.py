"""The table of distillation after compressing and refining, for docs/results.md."""

from typing import Any

from benchmarks.methods.tables import added, machine, markdown
from benchmarks.results import Results

Values = dict[str, Any]
UNMEASURED = "Not measured yet; `python -m benchmarks.heal.run --matrix benchmarks/repair/distill.yaml …` does it."


def distilled_page(closed: Results, distilled: Results) -> str:
    """What each step adds to the logarithm of perplexity, by model and size; `closed`: results of the closed form."""
    trained = {name: each for name, each in distilled.read().items() if "/distilled" in name}
    if not trained:
        return UNMEASURED
    forms, rows = closed.read(), []
    for name, each in sorted(trained.items()):
        model = name.split("/")[0]
        recipe, measured = each["experiment"]["recipe"], each["evaluation"]
        before, after = (added(measured[when]) for when in ("before", "after"))
        form = forms.get(f"{model}/auto-{recipe['keep']}")
        first = before if "refine" not in recipe or form is None else added(form["evaluations"][0])
        rows.append(
            [
                f"{model}, {measured['after']['text']['source']}",
                f"{recipe['keep']:.0%}",
                f"{first:+.4f}",
                f"{before:+.4f}" if "refine" in recipe else "",
                f"{after:+.4f}",
                f"{after / first:.2f}",
                *(f"{measured[when]['kl']:.4f}" for when in ("before", "after")),
                f"{each['tokens']:,}",
            ]
        )
    header = ["model, text", "kept of the targets", "auto", "refined", "distilled", "× auto"]
    header += ["KL before", "KL after", "tokens distilled"]
    return f"{markdown(header, rows)}\n\n{machine(next(iter(trained.values())))}"
