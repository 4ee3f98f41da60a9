"""The table of what runs take, for docs/results.md."""

from typing import Any

from benchmarks.cost.run import RESULTS, UNTOLD
from benchmarks.methods.tables import machine, markdown
from layershare.units import duration, size

UNMEASURED = "Not measured yet; `python -m benchmarks.cost.run` does it."


def cost_page() -> str:
    """By model: time and memory as they were told before the run and as they were, and estimates of larger models."""
    found = RESULTS.read()
    if not found:
        return UNMEASURED
    rows = []
    for model, each in sorted(found.items(), key=lambda item: item[1]["expected"]["seconds"]):
        told, stages = each["expected"], each.get("seconds", {})
        taken = {stage: seconds for stage, seconds in stages.items() if stage not in UNTOLD}
        peaks = {stage: peak for stage, peak in each.get("peaks", {}).items() if stage not in UNTOLD}
        rows.append(
            [
                model,
                duration(told["seconds"]),
                _beside(sum(taken.values()), told["seconds"], duration),
                *(f"{taken[stage]:.0f} s" if stage in taken else "" for stage in ("calibrate", "compare", "refit")),
                size(told["memory"]),
                _beside(max(peaks.values(), default=0), told["memory"], size),
            ]
        )
    header = ["model", "told", "taken", "statistics", "comparing plans", "refit", "memory, told", "memory, taken"]
    return f"{markdown(header, rows)}\n\n{machine(next(iter(found.values())))}"


def _beside(taken: float, told: float, words: Any) -> str:
    """What was measured, with how much more or less than told that is; nothing if there was no run."""
    return f"{words(taken)} ({taken / told - 1:+.0%})" if taken else ""
