import re

import pytest
import yaml
from huggingface_hub import metadata_load
from huggingface_hub.repocard_data import ModelCardData

from layershare.methods import METHODS
from layershare.report.card import card, citation
from layershare.report.runs import Run
from tests.report.made_up import DELTAS, make_run


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_reads(tmp_path):
    folder = make_run(tmp_path / "run", original={"base_model": "someone/some-model"})
    text = card(Run.read(folder, "run"))
    assert "[someone/some-model](https://huggingface.co/someone/some-model)" in text
    (folder / "README.md").write_text(text)
    front = metadata_load(folder / "README.md")
    assert front is not None
    assert front == front_matter(text)
    assert front["library_name"] == "transformers"
    assert front["base_model"] == "someone/some-model"
    assert front["tags"] == ["layershare", "compressed", "basis-sharing"]
    assert "license" not in front
    data = ModelCardData(**front)
    assert data.eval_results is not None
    assert [(each.metric_type, each.metric_value) for each in data.eval_results] == [("perplexity", 12.0)]


def test_licence_and_base_model_stand_there_only_where_they_are_known(tmp_path):
    known = {"license": "other", "license_name": "its-own", "license_link": "LICENSE", "base_model": "someone/base"}
    front = front_matter(card(Run.read(make_run(tmp_path / "a", original=known), "a")))
    assert {key: front[key] for key in known} == known
    front = front_matter(card(Run.read(make_run(tmp_path / "b"), "b")))
    assert not {*known, "base_model_relation"} & set(front)


def test_a_card_names_a_folder_without_the_way_to_it(tmp_path):
    text = card(Run.read(make_run(tmp_path / "run", model=str(tmp_path / "the-model")), "run"))
    assert "# the-model, compressed to" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("name", ["m{o}del", "a`b|c", "a: b", "#", "\nx", "\udcff", "---", "'\"", "é 模型"])
def test_odd_names_of_models(name, tmp_path):
    text = card(Run.read(make_run(tmp_path / "run", model=name), "run"))
    assert front_matter(text.encode().decode())["model-index"][0]["name"].endswith("at 80\N{NO-BREAK SPACE}%")


def test_what_was_measured_may_be_infinite(tmp_path):
    text = card(Run.read(make_run(tmp_path / "run", perplexity=float("inf")), "run"))
    assert "| perplexity | 10 | inf |" in text
    assert "model-index" not in front_matter(text)


def test_the_card_says_what_was_done_and_measured(tmp_path):
    text = card(Run.read(make_run(tmp_path / "run"), "run"))
    assert "(group_size 2, shared q): 2 bases shared by 2 layers each" in text
    assert "| perplexity in blocks of 16 tokens | 10 | 12 | +20.0% |" in text
    assert "arXiv 2410.03765" in text
    unmeasured = card(Run.read(make_run(tmp_path / "other", perplexity=None, method="svd"), "run"))
    assert "No quality was measured" in unmeasured
    assert "model-index" not in unmeasured
    assert not re.search(r"\d{4}-\d\d-\d\d|" + re.escape(str(tmp_path)), text)  # two runs of a recipe have one card


def test_zero_shot_scores_are_a_measurement(tmp_path):
    both = card(Run.read(make_run(tmp_path / "both", tasks=True), "run"))
    alone = card(Run.read(make_run(tmp_path / "alone", perplexity=None, tasks=True), "run"))
    for text in (both, alone):
        assert "| arc_easy, acc (zero-shot) | 0.500 ± 0.025 | 0.250 ± 0.020 | |" in text
        assert "No quality was measured" not in text
    assert ("| perplexity " in both, "| perplexity " in alone) == (True, False)


def test_the_card_tells_how_this_very_model_loads(tmp_path):
    block = {"kind": "drop", "part": "block", "layers": [2]}
    merge = {"kind": "merge", "into": 3, "layers": [3, 4], "coefficients": [0.5, 0.5]}
    cards = {
        name: card(Run.read(make_run(tmp_path / name, edits=edits), "run"))
        for name, edits in {
            "ordinary": [block, merge],
            "nothing": [],
            "dropped": [block, {"kind": "drop", "part": "mlp", "layers": [1]}],
            "deltas": DELTAS,
            "sliced": [{"kind": "slice", "width": 8}],
        }.items()
    }
    needs = {name: "`pip install .` in a checkout of layershare" in text for name, text in cards.items()}
    assert needs == {"ordinary": False, "nothing": False, "dropped": True, "deltas": True, "sliced": True}
    assert {name for name, text in cards.items() if "layershare export" in text} == {"dropped", "deltas"}


def test_every_method_can_be_cited():
    assert all(citation(name).endswith(".") for name in METHODS)
    assert citation("svd-llm").startswith("Wang, Zheng, Wan, Zhang")
    assert citation("by-hand") == "The method `by-hand` of layershare."
