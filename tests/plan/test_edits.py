import json
import math
import os
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from layershare.calibrate.stats import Statistic
from layershare.errors import LayershareError
from layershare.methods import make_method, plan_with
from layershare.model.describe import describe
from layershare.plan.budget import measure
from layershare.plan.edits import Delta, Drop, Merge, Share, Slice, check, places
from layershare.plan.needs import AT_WORK, estimate_needs
from layershare.plan.plan import Plan
from layershare.plan.table import plan_table
from layershare.units import size
from tests.families import CONFIGS

SPEC = describe(CONFIGS["llama"]())
PLAN = plan_with(SPEC, "basis-sharing", make_method("basis-sharing"), 0.8, "targets")


def test_a_plan_survives_json():
    assert Plan.from_json(PLAN.to_json()) == PLAN


def test_a_plan_edited_by_hand_is_measured_again(tmp_path):
    values = json.loads(PLAN.to_json())
    values["edits"] = [{"places": [["o", 0], ["o", 1], ["o", 2], ["o", 3]], "rank": 7, "side": "output"}]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    plan = Plan.read(path, SPEC)
    assert plan.after.all.parameters == PLAN.before.all.parameters - 4 * 32 * 32 + 7 * 5 * 32
    assert plan.before == PLAN.before


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"places": [["q", 9]], "rank": 2, "side": "input"}, "q of layer 9, which this model does not have"),
        ({"places": [["x", 0]], "rank": 2, "side": "input"}, "x of layer 0"),
        ({"places": [["q", 0], ["q", 0]], "rank": 2, "side": "input"}, "twice"),
        ({"places": [["q", 0]], "rank": 33, "side": "input"}, "rank 33"),
        ({"places": [["down", 0], ["down", 1]], "rank": 33, "side": "output"}, "rank 33"),
        ({"places": [["q", 0]], "rank": 0, "side": "input"}, "rank 0"),
        ({"places": [["q", 0]], "rank": 2, "side": "left"}, "side"),
        ({"places": [], "rank": 2, "side": "input"}, "no layers"),
        ({"role": "up", "anchor": 9, "layers": [1], "rank": 2}, "up of layer 9, which this model does not have"),
        ({"role": "up", "anchor": 0, "layers": [1, 9], "rank": 2}, "up of layer 9, which this model does not have"),
        ({"role": "x", "anchor": 0, "layers": [1], "rank": 2}, "x of layer 0"),
        ({"role": "up", "anchor": 0, "layers": [1, 1], "rank": 2}, "twice"),
        ({"role": "up", "anchor": 0, "layers": [1, 0, 0], "rank": 2}, "twice"),
        ({"role": "up", "anchor": 0, "layers": [1], "rank": 33}, "rank 33"),
        ({"role": "up", "anchor": 0, "layers": [1], "rank": 0}, "rank 0"),
        ({"role": "up", "anchor": 0, "layers": [], "rank": 2}, "a delta of no layers"),
        ({"role": "up", "anchor": 0, "layers": [0], "rank": 2}, "a delta to its own weight alone"),
    ],
)
def test_plans_that_do_not_fit_are_refused(tmp_path, edit, message):
    values = json.loads(PLAN.to_json()) | {"edits": [edit]}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    with pytest.raises(LayershareError, match=message):
        Plan.read(path, SPEC)


UP = Delta("up", 0, (1, 3), 2)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Share(places("up", (0, 2)), 2, "input"), "names up of layer 0 twice"),
        (Share(places("up", (2, 3)), 2, "input"), "names up of layer 3 twice"),
        (Delta("up", 2, (0,), 2), "names up of layer 0 twice"),
        (Drop("mlp", (1,)), "names up of layer 1 twice"),
        (Drop("block", (2,)), "cannot share weights as well"),
        (Merge(2, (2, 3), (0.5, 0.5)), "names up of layer 3 twice"),
        (Slice(16), "can have no other edits"),
        (Share(places("up", (2,)), 2, "input"), None),
        (Delta("gate", 0, (1, 3), 2), None),
        (Drop("attention", (0, 1)), None),
    ],
)
def test_what_stands_beside_a_delta(other, message):
    for edits in ([UP, other], [other, UP]):
        if message is None:
            check(SPEC, edits)
        else:
            with pytest.raises(LayershareError, match=message):
                check(SPEC, edits)


def test_a_delta_joins_only_layers_of_one_shape():
    spec = replace(SPEC, linears=tuple(replace(x, d_out=40) if x.layer == 3 else x for x in SPEC.linears))
    with pytest.raises(LayershareError, match="differ in the width of 'base': they cannot share it"):
        check(spec, [UP])


def test_ids_and_users_of_deltas():
    assert (UP.id, UP.places) == ("up.00+01-03", places("up", (0, 1, 3)))
    mean = Delta("up", 0, (0, 1), 2)
    assert (mean.id, mean.places) == ("up.00+00-01", places("up", (0, 1)))
    values = json.loads(PLAN.to_json()) | {"edits": [vars(UP), vars(mean), vars(UP) | {"kind": "delta"}]}
    assert Plan.from_json(json.dumps(values)).edits == (UP, mean, UP)


def test_what_is_no_plan_is_refused(tmp_path):
    with pytest.raises(LayershareError, match=r"there is no 'none\.json'"):
        Plan.read(tmp_path / "none.json", SPEC)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(LayershareError, match="not a plan"):
        Plan.read(tmp_path / "plan.json", SPEC)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keep": "x"}, "keep=x is not understood"),
        ({"keep": True}, "keep: Input should be a fraction"),
        ({"of": "half"}, "of: Input should be 'all', 'targets' or 'multiplications'"),
        ({"options": [1]}, "options: Input should be a mapping"),
        ({"model_type": "gpt2"}, "is for a 'gpt2' model, this is a 'llama'"),
        ({"colour": 1}, "colour: there is no such key"),
        ({"edits": None}, "edits: Input should be a list"),
        ({"edits": [[1]]}, "edits.0: Input should be a mapping"),
        ({"edits": [{"kind": "zap"}]}, "edits.0: there is no such kind"),
        ({"edits": [vars(UP) | {"rank": True}]}, "edits.0.delta.rank: Input should be a whole number"),
        ({"edits": [vars(UP) | {"rank": 2.0}]}, "rank: Input should be a whole number"),
        ({"edits": [vars(UP) | {"rank": "2"}]}, "rank: Input should be a whole number"),
        ({"edits": [vars(UP) | {"layers": [True]}]}, "layers.0: Input should be a whole number"),
        ({"edits": [vars(UP) | {"rnk": 2}]}, "rnk: there is no such key"),
        ({"edits": [{"kind": "slice", "width": True}]}, "width: Input should be a whole number"),
        ({"edits": [vars(Merge(0, (0, 1), (0.5, math.nan)))]}, "coefficients.1: Input should be a finite number"),
        ({"edits": [vars(Merge(0, (0, 1), (0.5, 1e300)))]}, "Input should be at most"),
        ({"edits": [{}] * 100_001}, "edits.0.share.places: it is missing"),
        ({"edits": [vars(UP) | {"layers": [0] * 100_001}]}, "there are too many entries"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_no_plan_has(tmp_path, change, said):
    (tmp_path / "plan.json").write_text(json.dumps(json.loads(PLAN.to_json()) | change))
    with pytest.raises(LayershareError, match=said):
        Plan.read(tmp_path / "plan.json", SPEC)


def test_files_that_hold_no_plan(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("x" * 300), Path("x" * 5000)):
        with pytest.raises(LayershareError, match=r"The plan .* cannot be used"):
            Plan.read(path, SPEC)
    twice = PLAN.to_json().rstrip()[:-1] + ', "keep": 0.5}'
    for text, said in (("[" * 100_000, "nested too deeply"), ("null", "the text"), ("", "not JSON"), (twice, "twice")):
        with pytest.raises(LayershareError, match=said):
            Plan.from_json(text)


def test_the_table_shows_groups_ranks_and_sizes():
    needs = estimate_needs(SPEC, PLAN, blocks=4, length=32, batch_size=2, kinds={"inputs"})
    console = Console(width=140, record=True, file=StringIO())
    console.print(plan_table(SPEC, PLAN, needs))
    text = console.export_text()
    assert "2 × 2 (input)" in text
    assert f"{PLAN.after.all.parameters:,}" in text
    assert "of memory" in text
    assert needs.stats == 4 * 4 * (3 * 32**2 + 56**2)


def test_the_table_and_the_needs_of_deltas():
    edits = (Delta("up", 0, (1, 3), 2), Delta("down", 1, (1, 2), 3))
    plan = replace(PLAN, edits=edits, after=measure(SPEC, edits))
    console = Console(width=140, record=True, file=StringIO())
    console.print(plan_table(SPEC, plan))
    lines = {line.split()[0]: line for line in console.export_text().splitlines() if "delta)" in line}
    assert "0, 1, 3" in lines["up"]
    assert "1 × 3 (delta)" in lines["up"]
    assert f"{32 * 56 + 2 * 2 * (32 + 56):,}" in lines["up"]
    assert "1–2" in lines["down"]
    assert "1 × 2 (mean, delta)" in lines["down"]

    needs = estimate_needs(SPEC, plan, blocks=1, length=2, batch_size=1, kinds=())
    assert needs.memory - AT_WORK >= 8 * 5 * 56**2  # the eigenproblem of down's inputs
    assert needs.output == 2 * plan.after.all.bytes


def test_statistics_take_the_room_of_what_is_measured_and_gradients_and_searches_that_of_the_model():
    def needs(*kinds: Statistic, searches: bool = False):
        return estimate_needs(SPEC, None, blocks=1000, length=32, batch_size=2, kinds=kinds, searches=searches)

    assert needs().stats == needs("fisher").stats == 0
    assert needs("blocks").stats == 4 * 1000 * 32 * 4  # layers × blocks × width × float32: no Grams
    model = PLAN.before.all.bytes
    assert needs().memory - AT_WORK < model < needs("fisher").memory - AT_WORK
    assert needs(searches=True).memory - AT_WORK > 2 * model


def test_bytes_for_people():
    assert [size(999), size(1500), size(2_340_000_000)] == ["999 bytes", "1.5 kB", "2.34 GB"]
