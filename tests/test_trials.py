"""What calibration finds of whole plans, and what other plans are expected to lose by that."""

import math
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from layershare.calibrate.stats import Stats
from layershare.job import Job, planned, prepare
from layershare.model.describe import describe
from layershare.plan.evidence import Evidence
from layershare.plan.table import plan_table
from layershare.recipe import make_recipe
from layershare.report.words import compared
from layershare.run import calibrate_to, run
from layershare.trials import TRIED
from tests.families import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")
AUTO = ("inputs", "gradients")
SPEC = describe(tiny_model("llama"))


def settings(folder: Path, **changes: Any):
    text = {"text": str(folder.parent / "text.txt"), "blocks": 16, "length": 32, "stats": str(folder.parent / "stats")}
    values = {"model": str(folder), "of": "targets", "options": {"compare": False}, "calibration": text}
    return make_recipe({**values, **changes})


def shown(job: Job) -> str:
    """What a terminal shows of a job's plan."""
    assert job.plan is not None
    console = Console(file=StringIO(), width=80)
    console.print(plan_table(job.spec, job.plan))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_plan_that_was_tried_is_expected_to_lose_what_it_loses(folder, tmp_path):
    stats = calibrate_to(settings(folder), AUTO)
    noted = {path: path.stat().st_mtime_ns for path in stats.rglob("trial-*")}
    assert len(noted) == len(TRIED)
    for keep in TRIED:
        recipe = settings(folder, keep=keep)
        job = planned(prepare(recipe), stats)
        results = run(recipe, tmp_path / f"{keep}", pages=False)
        assert job.plan is not None
        assert results.held_out is not None
        assert job.plan.expected_kl == pytest.approx(results.held_out.kl["own"], rel=1e-4)
        assert results.held_out.expected == job.plan.expected_kl
        assert f"({job.plan.expected_kl:.2g} expected)" in compared(results.held_out)
        assert f"Expected: a KL divergence of {job.plan.expected_kl:.2g}" in shown(job)
    calibrate_to(settings(folder), AUTO)
    assert {path: path.stat().st_mtime_ns for path in stats.rglob("trial-*")} == noted


@pytest.mark.parametrize("predicted", [1e-4, 2e-3, 1e-2, 0.05, 0.3])
def test_what_is_expected_follows_the_plans_that_were_tried(predicted, tmp_path):
    """In proportion below the first one, and as a power of the prediction above it, through both."""
    stats = Stats(tmp_path, {})
    evidence = Evidence(SPEC, measured=stats)
    assert evidence.expected(predicted) is None
    stats.write_trial(0.5, 0.02, 0.08)
    assert evidence.expected(predicted) is None
    stats.write_trial(0.8, 0.002, 0.004)
    found = evidence.expected(predicted)
    assert found is not None
    if predicted <= 0.002:
        assert found == pytest.approx(2 * predicted)
    else:  # from 2 to 4 times in one decade
        assert found / predicted == pytest.approx(2 * 2 ** math.log10(predicted / 0.002))


def test_a_trial_leaves_what_others_have_measured_meanwhile(tmp_path):
    stats, other = Stats(tmp_path, {}), Stats(tmp_path, {})
    other.write_trial(0.8, 0.002, 0.004)
    stats.write_trial(0.5, 0.02, 0.08)
    assert Stats(tmp_path, {}).trials == [(0.002, 0.004), (0.02, 0.08)]


def test_without_gradients_or_blocks_to_spare_no_plan_is_tried(folder):
    calibrate_to(settings(folder), ["inputs"])
    assert not [*folder.parent.glob("stats/*/trial-*")]
    (folder.parent / "text.txt").write_text("a " * 20)
    with pytest.warns(UserWarning, match="has 1 blocks"):
        calibrate_to(settings(folder), AUTO)
    assert not [*folder.parent.glob("stats/*/trial-*")]
