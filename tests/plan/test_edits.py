import json
from io import StringIO

import pytest
from rich.console import Console

from layershare.calibrate.stats import Kind
from layershare.errors import LayershareError
from layershare.methods import make_method, plan_with
from layershare.model.arch import describe
from layershare.plan.needs import estimate_needs
from layershare.plan.plan import Plan
from layershare.plan.table import plan_table, size
from tests.families import CONFIGS

SPEC = describe(CONFIGS["llama"]())
PLAN = plan_with(SPEC, "basis-sharing", make_method("basis-sharing"), 0.8, "targets")


def test_a_plan_survives_json():
    assert Plan.from_json(PLAN.to_json()) == PLAN


def test_a_plan_edited_by_hand_is_measured_again(tmp_path):
    values = json.loads(PLAN.to_json())
    values["edits"] = [{"role": "o", "layers": [0, 1, 2, 3], "rank": 7, "side": "output"}]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    plan = Plan.read(path, SPEC)
    assert plan.after.all.parameters == PLAN.before.all.parameters - 4 * 32 * 32 + 7 * 5 * 32
    assert plan.before == PLAN.before


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"role": "q", "layers": [9], "rank": 2, "side": "input"}, "q of layer 9, which this model does not have"),
        ({"role": "x", "layers": [0], "rank": 2, "side": "input"}, "x of layer 0"),
        ({"role": "q", "layers": [0, 0], "rank": 2, "side": "input"}, "twice"),
        ({"role": "q", "layers": [0], "rank": 33, "side": "input"}, "rank 33"),
        ({"role": "down", "layers": [0, 1], "rank": 33, "side": "output"}, "rank 33"),
        ({"role": "q", "layers": [0], "rank": 0, "side": "input"}, "rank 0"),
        ({"role": "q", "layers": [0], "rank": 2, "side": "left"}, "side"),
        ({"role": "q", "layers": [], "rank": 2, "side": "input"}, "no layers"),
    ],
)
def test_plans_that_do_not_fit_are_refused(tmp_path, edit, message):
    values = json.loads(PLAN.to_json()) | {"edits": [edit]}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    with pytest.raises(LayershareError, match=message):
        Plan.read(path, SPEC)


def test_what_is_no_plan_is_refused(tmp_path):
    with pytest.raises(LayershareError, match="There is no plan"):
        Plan.read(tmp_path / "none.json", SPEC)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(LayershareError, match="not a plan"):
        Plan.read(tmp_path / "plan.json", SPEC)


def test_the_table_shows_groups_ranks_and_sizes():
    needs = estimate_needs(SPEC, PLAN, blocks=4, length=32, batch_size=2, kinds={"inputs"})
    console = Console(width=140, record=True, file=StringIO())
    console.print(plan_table(SPEC, PLAN, needs))
    text = console.export_text()
    assert "2 × 2 (input)" in text
    assert f"{PLAN.after.all.parameters:,}" in text
    assert "of memory" in text
    assert needs.stats == 4 * 4 * (3 * 32**2 + 56**2)


def test_statistics_take_the_room_of_what_is_measured_and_gradients_and_searches_that_of_the_model():
    def needs(*kinds: Kind, searches: bool = False):
        return estimate_needs(SPEC, None, blocks=1000, length=32, batch_size=2, kinds=kinds, searches=searches)

    assert needs().stats == needs("fisher").stats == 0
    assert needs("blocks").stats == 4 * 1000 * 32 * 4  # layers × blocks × width × float32: no Grams
    model = PLAN.before.all.bytes
    assert needs().memory < model < needs("fisher").memory
    assert needs(searches=True).memory > 2 * model


def test_bytes_for_people():
    assert [size(999), size(1500), size(2_340_000_000)] == ["999 bytes", "1.5 kB", "2.34 GB"]
