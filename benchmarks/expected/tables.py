"""The table of what `plan` expects and what was measured, for docs/results.md."""

from benchmarks.expected.run import MEASURED, METHOD, RESULTS
from benchmarks.methods.tables import machine, markdown
from benchmarks.results import Results


def expected_page() -> str:
    """By model and size: the KL divergence that is expected, and that of the run, as solved and as refitted."""
    measured = {}
    for folder in MEASURED:
        measured |= Results(folder / "results.jsonl").read()
    found = RESULTS.read()
    rows = []
    for name, each in sorted(found.items(), key=lambda item: (item[0].split("/")[0], -item[1]["experiment"]["keep"])):
        model, keep = name.split("/")[0], each["experiment"]["keep"]
        cells = []
        for method in (METHOD, "auto"):
            there = measured.get(f"{model}/{method}-{keep}")
            kl = None if there is None else there["evaluations"][0]["kl"]
            cells.append("" if kl is None else f"{kl:.4f} ({kl / each['expected_kl'] - 1:+.0%})")
        rows.append([model, f"{keep:.0%}", f"{each['predicted_loss']:.4f}", f"{each['expected_kl']:.4f}", *cells])
    header = ["model", "kept of the targets", "predicted loss", "expected KL", "measured without refit", "with refit"]
    return f"{markdown(header, rows)}\n\n{machine(next(iter(found.values())))}"
