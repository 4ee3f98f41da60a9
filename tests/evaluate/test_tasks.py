"""Zero-shot tasks, offline: our numbers are those of the papers' definition, computed by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from layershare.errors import LayershareError
from layershare.evaluate.tasks import PAPERS, load_tasks, run_tasks, task_names
from layershare.recipe import make_recipe
from layershare.run import run
from layershare.store import as_json
from tests.conftest import SHARED, shared_model
from tests.families import tiny_model

PIQA = [
    {"goal": "open a jar", "sol1": "turn the lid", "sol2": "sit on it", "label": 0},
    {"goal": "dry a shirt", "sol1": "bury it", "sol2": "hang it up", "label": 1},
    {"goal": "cut bread", "sol1": "with a knife", "sol2": "with a spoon", "label": 0},
    {"goal": "boil an egg", "sol1": "put it in ice", "sol2": "put it in hot water", "label": 1},
    {"goal": "wake up in time", "sol1": "set an alarm", "sol2": "sing", "label": 0},
]


def arc(question: str, *texts: str) -> dict:
    labels = list("ABCDE"[: len(texts)])
    return {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": "B"}


def write_rows(folder: Path, **tasks: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in tasks.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    before, ids = (tokenizer(text)["input_ids"] for text in (context, context + continuation))
    log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[i - 1, ids[i]]) for i in range(len(before), len(ids)))


def test_accuracy_is_that_of_the_likelihoods(tmp_path, tokenizer):
    model = tiny_model("llama").train()
    data = write_rows(tmp_path / "data", piqa=PIQA)
    done = []
    result = run_tasks(
        load_tasks(["piqa"], data), model, tokenizer, batch_size=3, progress=lambda *now: done.append(now)
    )["piqa"]
    right = right_per_letter = 0
    model.eval()
    for row in PIQA:
        choices = [row["sol1"], row["sol2"]]
        scores = [log_likelihood(model, tokenizer, f"Question: {row['goal']}\nAnswer:", f" {c}") for c in choices]
        right += scores.index(max(scores)) == row["label"]
        scores = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        right_per_letter += scores.index(max(scores)) == row["label"]
    assert result.scores["acc"].value == right / 5
    assert result.scores["acc_norm"].value == right_per_letter / 5
    variance = right / 5 * (1 - right / 5) * 5 / 4  # of one row, from a sample
    assert result.scores["acc"].stderr == pytest.approx((variance / 5) ** 0.5)
    assert (result.rows, result.shots, result.source, result.chance) == (5, 0, "piqa.jsonl", 0.5)
    assert done == [(0, 1), (1, 1)]
    assert tokenizer.pad_token is None


def test_guessing_depends_on_the_number_of_choices_and_limits_are_kept(tmp_path, tokenizer):
    rows = [arc("one", "a", "b"), arc("two", "a", "b", "c", "d"), arc("three", "a", "b", "c", "d")]
    data = write_rows(tmp_path / "data", arc_easy=rows, arc_challenge=rows)
    results = run_tasks(load_tasks(["arc_easy", "arc_challenge"], data), tiny_model("llama"), tokenizer)
    assert results["arc_easy"].chance == results["arc_challenge"].chance == pytest.approx(1 / 3)
    first = run_tasks(load_tasks(["arc_easy"], data, limit=1), tiny_model("llama"), tokenizer)["arc_easy"]
    assert (first.rows, first.chance) == (1, 0.5)
    assert first.sha256 != results["arc_easy"].sha256 == results["arc_challenge"].sha256


def test_a_score_is_near_guessing_or_not(tmp_path, tokenizer):
    """A model that prefers the letter b, asked for it, is better than guessing; over both letters it is not."""
    model = tiny_model("opt")
    bias = torch.zeros(model.config.vocab_size)
    bias[tokenizer("b")["input_ids"]] = 100
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    goals = [f"number {n}" for n in range(8)]
    always = [{"goal": goal, "sol1": "b", "sol2": "c", "label": 0} for goal in goals]
    half = [{**row, "label": n % 2} for n, row in enumerate(always)]
    for rows, value, near in ((always, 1.0, False), (half, 0.5, True)):
        data = write_rows(tmp_path / "data", piqa=rows)
        score = run_tasks(load_tasks(["piqa"], data), model, tokenizer)["piqa"].scores["acc"]
        assert (score.value, score.near_chance) == (value, near)


def test_what_is_wrong_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    data = write_rows(tmp_path / "data", piqa=[*PIQA, {"goal": "no solution", "label": 1}], arc_easy=[{"q": 1}])
    for names, message in {
        ("arc_esy",): "Unknown task 'arc_esy'. Did you mean 'arc_easy'",
        ("",): "Unknown task ''. Known: arc_challenge, .*winogrande.$",
        ("papers",): "no file '.*openbookqa.jsonl' with the rows of the task 'openbookqa'",
        ("piqa",): "Line 6 of 'piqa.jsonl' does not have the fields of the first line",
        ("arc_easy",): r"'arc_easy' cannot use the rows of 'arc_easy.jsonl' .*; compare its fields",
    }.items():
        with pytest.raises(LayershareError, match=message):
            load_tasks(names, data)
    (data / "piqa.jsonl").write_text("not JSON\n")
    with pytest.raises(LayershareError, match=r"Line 1 of 'piqa\.jsonl' is not JSON"):
        load_tasks(["piqa"], data)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LayershareError, match=r"needs? lm-eval: `pip install '\.\[eval\]'` in a checkout"):
        load_tasks(["piqa"], data)


ROW = {"goal": "x", "sol1": "a", "sol2": "b", "label": 0}
SPOILT = {
    "null": ({"label": None}, "Line 6 of 'piqa.jsonl' has no value for 'label' .null."),
    "null text": ({"goal": None}, "Line 6 of 'piqa.jsonl' has no value for 'goal'"),
    "text for a number": ({"label": "0"}, "Line 6 of 'piqa.jsonl' has a 'label' of type str; above it is float"),
    "list for text": ({"sol1": ["a"]}, "Line 6 of 'piqa.jsonl' has a 'sol1' of type list; above it is str"),
    "beyond the choices": ({"label": 2}, "the answer 2 is none of 2 choices"),
    "negative": ({"label": -1}, "the answer -1 is none of 2 choices"),
    "truth value": ({"label": True}, "has a 'label' of type bool"),
    "no choice": ({"sol1": ""}, "are no choices"),
    "surrogate": ({"goal": "\ud800"}, "The value of 'goal' holds half a character"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_rows_that_would_be_scored_as_something_else_are_refused(case, tmp_path):
    change, message = SPOILT[case]
    with pytest.raises(LayershareError, match=message):
        load_tasks(["piqa"], write_rows(tmp_path / "data", piqa=[*PIQA, ROW | change]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "piqa.jsonl' has no rows"),
        (b"\n\n", "piqa.jsonl' has no rows"),
        (b"[1]", "Line 1 of 'piqa.jsonl' is no object"),
        (b"{}", "piqa.jsonl' has no rows"),
        (b"[" * 100_000, "Line 1 of 'piqa.jsonl' .*nested too deeply"),
        (json.dumps(ROW | {"goal": "caf\xe9"}, ensure_ascii=False).encode("latin-1"), "not UTF-8 .*iconv"),
        (b"\x1f\x8b\x08\x00", "binary|NUL"),
        ("".join(json.dumps(ROW | {"label": each}) + "\n" for each in "01").encode(), "the answer '0' is none"),
    ],
)
def test_files_of_rows_that_are_none(content, message, tmp_path):
    data = write_rows(tmp_path / "data")
    (data / "piqa.jsonl").write_bytes(content)
    with pytest.raises(LayershareError, match=message):
        load_tasks(["piqa"], data)


def test_rows_with_a_mark_and_blank_lines_are_read(tmp_path, tokenizer):
    data = write_rows(tmp_path / "data")
    text = "\ufeff\n" + "\n \n".join(map(json.dumps, PIQA))
    (data / "piqa.jsonl").write_text(text, encoding="utf-16-le")
    tasks = load_tasks(["piqa"], data)
    assert len(tasks.rows(tasks.loaded["piqa"]["tasks"]["piqa"])) == len(PIQA)
    with pytest.raises(LayershareError, match="the model knows 20"):
        tasks.require_within(20, tokenizer)


def test_every_name_of_lm_eval_is_found_in_its_files(tmp_path):
    tasks = {
        "one/a.yaml": "include: ../_base\ntask: alpha # ours\ndataset_path: x\n",
        "one/b.yaml": '"tag": ["first", second]\n"task": "beta"\n',
        "two/c.yaml": "task: beta\ntag:\n  - third\n",
        "two/group.yaml": "group: both\ntask:\n  - alpha\n  - beta\n",
        "two/_base": "tag: fourth\n",
        "two/notes.md": "task: no\n",
    }
    for name, text in tasks.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    names = dict.fromkeys(["beta", "first", "second", "third", "fourth", "both"]) | {"alpha": "one"}
    assert {name: folder for name, folder in task_names(tmp_path).items() if name != "-"} == names


def test_a_recipe_measures_tasks_beside_a_text_and_alone(tmp_path, tokenizer, words, commands):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    data = write_rows(tmp_path / "data", piqa=PIQA)
    (tmp_path / "text.txt").write_text("\n".join(words))
    evaluation = {
        "text": str(tmp_path / "text.txt"),
        "blocks": 2,
        "tasks": ["piqa"],
        "tasks_data": str(data),
        "limit": 4,
    }
    values = {"model": str(tmp_path / "dense"), "method": "svd", "of": "targets", "evaluation": evaluation}
    results = as_json(run(make_recipe(values), tmp_path / "out"))
    measured = results["evaluation"]
    assert measured["perplexity"]["value"] > 1
    assert (measured["tasks"]["piqa"]["rows"], measured["original_tasks"]["piqa"]["chance"]) == (4, 0.5)
    assert results["versions"]["lm_eval"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results

    command = ["eval", "out", "--tasks", "piqa", "--tasks-data", "data", "--limit", "4", "--json"]
    shown = subprocess.run(
        [commands / "layershare", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(shown.stdout) == {"tasks": measured["tasks"]}
    assert [line.split()[0] for line in shown.stderr.splitlines() if line.strip()] == ["evaluate"]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"text": None}, "neither a text nor tasks"),
        ({"limit": 3}, "no tasks; name some"),
        ({"tasks": ["piqa"], "limit": 0}, r"'evaluation.limit' in the recipe"),
        ({"task": ["piqa"]}, "Did you mean 'tasks'"),
    ],
)
def test_recipes_that_ask_for_nothing_or_the_impossible(evaluation, message):
    with pytest.raises(LayershareError, match=message):
        make_recipe({"model": "m", "evaluation": evaluation})


def test_the_papers_tasks_on_real_rows():
    data = SHARED / "data" / "zeroshot"
    if not data.is_dir():
        pytest.skip("the rows are not here")
    folder = shared_model("stories260K")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    here = [name for name in PAPERS if (data / f"{name}.jsonl").is_file()]
    results = run_tasks(load_tasks(here, data, limit=4), model, tokenizer, batch_size=8)
    assert list(results) == here
    assert {name: round(result.chance or 0, 2) for name, result in results.items()} == {
        "openbookqa": 0.25,
        "winogrande": 0.5,
        "piqa": 0.5,
        "mathqa": 0.2,
        "arc_easy": 0.25,
        "arc_challenge": 0.25,
    }
