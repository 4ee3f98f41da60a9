"""Whole plans carried out and measured, so that what `auto` predicts of others can be read.

The predicted loss is a quadratic form, summed over matrices, under the statistics of the calibration text. It leaves
out how errors add up from block to block, and that other text differs. What two plans of the model really lose on
held-out text tells how much that is (`Evidence.expected`).
"""

from dataclasses import replace
from pathlib import Path

from layershare.methods import plan_with
from layershare.methods.auto import Auto
from layershare.plan.evidence import Evidence
from layershare.progress import part
from layershare.solve.apply import Factored
from layershare.solve.held_out import HeldOut
from layershare.store import Store

TRIED = (0.8, 0.5)
"""How much of the targets the plans keep."""


def try_plans(evidence: Evidence, scratch: Path) -> None:
    """Solve `auto`'s plans of the sizes `TRIED` and measure them, unless that is noted in the statistics already.

    What is solved lies in `scratch` meanwhile. Raises `LayershareError` as `plan_with` and `Factored.solve`.
    """
    method = Auto(compare=False)
    missing = [keep for keep in TRIED if not evidence.stats.tried(keep)]
    for number, keep in enumerate(missing):
        solving, measuring = (part(evidence.progress, 2 * number + i, 2 * len(missing)) for i in range(2))
        plan = plan_with(evidence.spec, "auto", method, keep, "targets", evidence)
        assert plan.predicted_loss is not None
        folder = scratch / f"{keep}"
        factored = Factored(evidence.spec, plan, evidence.weights, folder, {})
        factored.solve(method, replace(evidence, progress=solving))
        kl = HeldOut(Store(folder / "held-out", {}), evidence).divergence("auto", lambda made=factored: made, measuring)
        evidence.stats.write_trial(keep, plan.predicted_loss, kl)
