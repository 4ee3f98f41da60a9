import json

import pytest

from layershare.errors import LayershareError
from layershare.report.runs import Run
from layershare.report.words import edits, story
from tests.report.made_up import DELTAS, OTHER, SHARED, make_run


def test_what_became_of_every_linear(tmp_path):
    cells = Run.read(make_run(tmp_path / "run"), "run").cells
    assert len(cells) == 5 * 6
    first, second = cells["q", 2], cells["q", 3]
    assert (first.kind, first.layers, first.rank, first.side) == ("share", (0, 2), 6, "input")
    assert first.kept == 6 * (16 + 2 * 16) / (2 * 16 * 16)
    assert first.error == 0.06
    assert cells["q", 0].group == first.group != second.group
    assert (cells["down", 4].kind, cells["down", 4].kept) == ("own", 3 * 40 / (24 * 16))
    assert (cells["q", 4].kind, cells["q", 4].kept, cells["q", 4].rank) == ("dense", 1, None)


def test_layers_with_deltas(tmp_path):
    folder = make_run(tmp_path / "run", edits=DELTAS)
    results = json.loads((folder / "results.json").read_text())
    results["groups"] = {"up.01+02-04": {"error": 0.25}, "down.01+01-02": {"error": 0.5}}
    (folder / "results.json").write_text(json.dumps(results))
    run = Run.read(folder, "run")
    cells, delta = run.cells, 16 + 24
    anchor, member = cells["up", 1], cells["up", 4]
    assert (anchor.kind, anchor.layers, anchor.rank, anchor.error) == ("anchor", (1, 2, 4), None, None)
    assert (member.kind, member.layers, member.rank, member.error) == ("delta", (1, 2, 4), 2, 0.25)
    assert anchor.group == member.group == 0
    assert (anchor.kept, member.kept) == (1 / 3, 1 / 3 + 2 * delta / (16 * 24))
    assert sum(cells["up", layer].kept or 0 for layer in (1, 2, 4)) == pytest.approx(1 + 2 * 2 * delta / (16 * 24))
    both = [cells["down", layer] for layer in (1, 2)]
    assert {(cell.kind, cell.layers, cell.rank, cell.error) for cell in both} == {("delta", (1, 2), 3, 0.5)}
    assert {cell.kept for cell in both} == {1 / 2 + 3 * delta / (16 * 24)}
    assert edits(run) == (
        "1 weight shared by 2 layers, with deltas; 1 weight shared by 3 layers, with deltas; 25 matrices unchanged"
    )


def test_edits_of_other_kinds(tmp_path):
    run = Run.read(make_run(tmp_path / "run", edits=OTHER), "run")
    kinds = {key: (cell.kind, cell.kept) for key, cell in run.cells.items()}
    assert [kinds[role, 1][0] for role in run.roles] == ["drop", "drop", "drop", "dense", "dense"]
    assert {kinds[role, 2] for role in run.roles} == {("drop", 0)}
    assert {kinds[role, 3] for role in run.roles} == {("merge", 1)}
    assert {kinds[role, 4] for role in run.roles} == {("merge", 0)}
    assert kinds["up", 5] == ("novelty", None)
    assert edits(run) == (
        "1 matrix changed by novelty; 11 matrices unchanged; attention of layer 1 dropped; layer 2 dropped; "
        "layers 3, 4 merged into layer 3"
    )


def test_edits_in_words(tmp_path):
    run = Run.read(make_run(tmp_path / "run"), "run")
    assert edits(run) == ("2 bases shared by 2 layers each; 1 matrix with own factors; 25 matrices unchanged")
    assert story(run) == (
        "someone/some-model at 80\N{NO-BREAK SPACE}%: 0.8 of 1 million parameters, perplexity 12.0 instead of 10.0"
    )


def test_an_edit_without_a_kind_shares(tmp_path):
    folder = make_run(tmp_path / "run")
    cells = Run.read(folder, "run").cells
    plan = json.loads((folder / "plan.json").read_text())
    plan["edits"] = [{key: value for key, value in edit.items() if key != "kind"} for edit in SHARED]
    (folder / "plan.json").write_text(json.dumps(plan))
    assert Run.read(folder, "run").cells == cells


def test_what_is_no_finished_run_is_refused(tmp_path):
    folder = make_run(tmp_path / "run")
    with pytest.raises(LayershareError, match="There is no folder"):
        Run.read(tmp_path / "nowhere", "x")
    with pytest.raises(LayershareError, match=r"is no finished run, it has no config\.json"):
        Run.read(tmp_path, "x")
    results = (folder / "results.json").read_text()
    (folder / "results.json").write_text(results[:100])
    with pytest.raises(LayershareError, match="is damaged"):
        Run.read(folder, "x")
    (folder / "results.json").write_text(json.dumps({"method": "svd"}))
    with pytest.raises(LayershareError, match="another version of layershare"):
        Run.read(folder, "x")
