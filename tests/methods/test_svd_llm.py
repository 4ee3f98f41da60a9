from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import layershare
from layershare.plan.edits import Share
from layershare.plan.plan import Plan
from tests.families import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")


def test_the_refit_changes_second_factors_alone_and_is_off_by_default(tmp_path, tokenizer, words):
    model, made = tiny_model("llama"), {}
    options: dict[str, dict[str, Any]] = {"off": {}, "on": {"refit": True}}
    text: dict[str, Any] = {"text": words, "blocks": 24, "length": 32}
    for name, chosen in options.items():
        folder = tmp_path / name
        chosen |= {"method": "svd-llm", "keep": 0.5, "of": "targets", "folder": folder}
        layershare.compress(model, tokenizer, **text, **chosen)
        made[name] = load_file(folder / "model.safetensors")
    assert '"refit": false' in (tmp_path / "off" / "results.json").read_text()
    changed = {name for name in made["on"] if not torch.equal(made["on"][name], made["off"][name])}
    plan = Plan.read(tmp_path / "on" / "plan.json", layershare.describe(model))
    second = {
        f"{plan_name(model, edit)}.{'coef' if edit.side == 'input' else 'basis'}.weight"
        for edit in plan.edits
        if isinstance(edit, Share)
    }
    assert changed == second


def plan_name(model, edit: Share) -> str:
    return f"model.{layershare.describe(model).linear(*edit.places[0]).name}"
