import json

import pytest

from layershare.errors import LayershareError
from layershare.report.page import page
from layershare.report.runs import Run
from layershare.report.words import edits, loading, story
from layershare.units import percent
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
    assert edits(run) == (
        "12 matrices unchanged; attention of layer 1 dropped; layer 2 dropped; layers 3, 4 merged into layer 3"
    )


def test_joint_bases_and_private_directions(tmp_path):
    joint = {"kind": "share", "places": [["q", 0], ["k", 0]], "rank": 4, "side": "input", "private_rank": 2}
    mixed = {"kind": "share", "places": [["q", 1], ["k", 1], ["q", 2], ["k", 2]], "rank": 5, "side": "input"}
    run = Run.read(make_run(tmp_path / "run", edits=[joint, mixed]), "run")
    cells = [run.cells[role, layer] for role in ("q", "k") for layer in range(3)]
    assert [cell.together for cell in cells] == ["q and k of layer 0", *["q and k of layers 1, 2"] * 2] * 2
    assert [cell.rank for cell in cells] == [6, 5, 5] * 2
    assert [cell.group for cell in cells] == [0, 1, 1] * 2
    assert run.cells["k", 0].kept == pytest.approx((4 * (16 / 2 + 8) + 2 * (16 + 8)) / (16 * 8))
    assert edits(run).startswith("1 basis shared by 2 matrices; 1 basis shared by 4 matrices; ")


def test_edits_in_words(tmp_path):
    run = Run.read(make_run(tmp_path / "run"), "run")
    assert edits(run) == ("2 bases shared by 2 layers each; 1 matrix with own factors; 25 matrices unchanged")
    assert story(run) == (
        "someone/some-model at 80\N{NO-BREAK SPACE}%: 0.8 of 1 million parameters, perplexity 12.0 instead of 10.0 in "
        "blocks of 16 tokens"
    )


def test_matrices_stored_as_integers(tmp_path):
    stored = {"kind": "quantize", "places": [["q", 4], ["q", 0], ["q", 2]], "bits": 3, "basis_bits": 4}
    run = Run.read(make_run(tmp_path / "run", edits=[*SHARED, stored]), "run")
    assert [run.cells["q", layer].bits for layer in range(5)] == [3, None, 3, None, 3]
    assert (run.cells["q", 0].kind, run.cells["q", 4].kind) == ("share", "dense")
    assert edits(run).endswith("; 24 matrices unchanged; 3 matrices stored as integers of 3 bits a number")
    assert "LoRA takes the usual names" in loading(run)
    sizes = run.results.after.all.bytes / run.results.before.all.bytes
    assert run.kept == sizes
    assert f"at {percent(sizes)} of its bytes: " in story(run)
    assert "Bits of a number" in page([run])


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
    for needed in ("results.json", "plan.json", "recipe.yaml"):
        (folder / needed).rename(folder / "kept")
        with pytest.raises(LayershareError, match=f"it has no {needed}"):
            Run.read(folder, "x")
        (folder / "kept").rename(folder / needed)


GARBAGE = {
    "cut off": '{"model": ',
    "null": "null",
    "a list": "[]",
    "another's": '{"method": "svd"}',
    "brackets": "[" * 100_000,
    "not UTF-8": b"\xff\xfe{",
    "a long number": '{"a": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("file", ["results.json", "plan.json", "speed.json"])
@pytest.mark.parametrize("content", GARBAGE)
def test_a_damaged_file_is_one_sentence_that_names_it(file, content, tmp_path):
    folder = make_run(tmp_path / "run")
    garbage = GARBAGE[content]
    (folder / file).write_bytes(garbage if isinstance(garbage, bytes) else garbage.encode())
    with pytest.raises(LayershareError, match=f"^The {file} of '.*' cannot be used \\(.*\\): .*\\.$"):
        page([Run.read(folder, "x")])


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"options": 5},
        {"keep": []},
        {"before": None},
        {"after": {"all": {"parameters": 1}}},
        {"before": {"all": dict.fromkeys(("parameters", "bytes", "multiplications"), 0)}},
        {"shapes": {}},
        {"shapes": {"q": [[1]]}},
        {"shapes": {"q": None}},
        {"groups": {"q.00-02": {"error": "much"}}},
        {"groups": {"q.00-02": {"error": 1e999}}},
        {"groups": {"q.00-02": {"rank": 6, "spectrum": {"index": [1]}}}},
        {"evaluation": {"text": {"source": "t", "blocks": 1, "length": 2}}},
        {"evaluation": {"tasks": {"a": {}}}},
        {"samples": [{}]},
        {"samples": {"prompt": 1}},
        {"healing": {}},
        {"healing": {"settings": {}, "needs": {}, "log": [], "text": {"source": "", "blocks": 1, "length": 1}}},
        {"seconds": {"solve": None}},
        {"versions": {}},
        {"machine": None},
        {"date": 5},
    ],
    ids=str,
)
def test_odd_values_in_results_are_one_sentence(change, tmp_path):
    folder = make_run(tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | change))
    with pytest.raises(LayershareError, match=r"^The results.* cannot be used \(.*\): .*\.$"):
        page([Run.read(folder, "x")])


@pytest.mark.parametrize(
    "edit",
    [
        *(5, {"places": ["q"]}, {"places": [["q"]]}, {"places": [["q", 0]], "rank": 1}, {"kind": "drop"}),
        *({"places": [["zz", 0]], "rank": 1, "side": "input"}, {"places": [["q", 9]], "rank": 1, "side": "input"}),
        {"kind": "novelty", "role": "up", "layers": [5]},
    ],
    ids=str,
)
def test_odd_edits_in_a_plan_are_one_sentence(edit, tmp_path):
    folder = make_run(tmp_path / "run")
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"edits": [edit]}))
    with pytest.raises(LayershareError, match=r"cannot be used \(.*\): .*\.$"):
        page([Run.read(folder, "x")])
