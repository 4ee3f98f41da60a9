"""Bases shared by several roles, and private directions beside them: from the plan to what loads and densifies."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import layershare
from layershare.methods import make_method
from layershare.methods.basis_sharing import sharing_groups
from layershare.model.describe import describe
from layershare.plan.edits import Place, Share
from layershare.recipe import make_recipe
from layershare.run import run
from tests.families import CONFIGS, tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")
CALIBRATION = {"blocks": 24, "length": 32}


def test_roles_that_read_the_same_input_are_joint():
    together = {
        family: {
            share.id: share.side
            for group in sharing_groups(describe(CONFIGS[family]()), None, 2, joint=True)
            if (share := group.share(1)).layers[0] == 0
        }
        for family in ("llama", "gpt2", "bloom", "phi3")
    }
    private = {"o.00": "output", "down.00": "output"}
    assert together["llama"] == {"q+k+v.00-01": "input", "gate+up.00-01": "input", **private}
    assert together["gpt2"] == {"qkv.00-01": "input", "o.00-01": "input", "up.00-01": "input", "down.00": "output"}
    assert together["bloom"] == {"qkv.00-01": "input", "up.00-01": "input", **private}
    assert together["phi3"] == {"qkv.00-01": "input", "gate_up.00-01": "input", **private}
    alone = sharing_groups(describe(CONFIGS["llama"]()), ["q", "gate", "up"], 1, joint=True)
    assert {group.share(1).id for group in alone} >= {"q.03", "k.03", "gate+up.03"}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "phi3", "bloom", "gemma2", "falcon", "opt"])
def test_families(family, tmp_path, tokenizer, words):
    """Joint bases in pivoted form with private directions, refitted."""
    model = tiny_model(family)
    plan = layershare.make_plan(model, method="basis-sharing", keep=0.6, of="targets", joint=True)
    shares = [edit for edit in plan.edits if isinstance(edit, Share)]
    spec = describe(model)
    for share in shares:
        sites = {(layer, spec.linear(role, layer).site) for role, layer in share.places}
        assert len(sites) == len(share.layers)
    values = json.loads(plan.to_json())
    for edit in values["edits"]:
        edit.update(private_rank=2, pivot=True)
    path, folder = tmp_path / "plan.json", tmp_path / "small"
    path.write_text(json.dumps(values))
    recipe = make_recipe({"model": family, "plan": str(path), "refit": True, "calibration": CALIBRATION})
    results = run(recipe, folder, model=model, tokenizer=tokenizer, text=words, pages=False)
    assert results.refit
    auto_class: Any = AutoModelForCausalLM
    small, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert sum(p.numel() for p in small.parameters()) == results.after.all.parameters
    assert (folder / "model.safetensors").stat().st_size == results.after.all.bytes
    expected = small(tokens()).logits
    small.save_pretrained(tmp_path / "again")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(tokens()).logits, expected)
    torch.testing.assert_close(small.dequantize()(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["svd-llm", "auto"])
def test_private_directions_take_off_error(method, tmp_path, tokenizer, words):
    model = tiny_model("llama")
    plan = json.loads(layershare.make_plan(model, method="svd-llm", keep=0.5, of="targets").to_json())
    plan.update(method=method, options={})
    errors = {}
    for private in (0, 4):
        plan["edits"] = [
            {"places": [["q", 0], ["k", 0], ["q", 1]], "rank": 8, "side": "input", "private_rank": private},
            {"places": [["down", 2], ["o", 3]], "rank": 8, "side": "output", "private_rank": private},
        ]
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        recipe = make_recipe({"model": "m", "plan": str(tmp_path / "plan.json"), "calibration": CALIBRATION})
        results = run(recipe, tmp_path / f"{private}", model=model, tokenizer=tokenizer, text=words, pages=False)
        errors[private] = {name: group.error for name, group in results.groups.items()}
    assert errors[0].keys() == errors[4].keys() == {"q.00+k.00+q.01", "down.02+o.03"}
    assert all(errors[4][name] < 0.8 * errors[0][name] for name in errors[0])


def test_joint_ranks_keep_to_the_budget():
    spec = describe(CONFIGS["qwen3"]())
    for pivot in (False, True):
        method = make_method("basis-sharing", {"joint": True, "pivot": pivot})
        plan = layershare.make_plan(CONFIGS["qwen3"](), method="basis-sharing", keep=0.7, joint=True, pivot=pivot)
        assert plan.options == {**vars(method)}
        assert 0.995 * 0.7 * spec.parameters <= plan.after.all.parameters <= 0.7 * spec.parameters
        assert any(isinstance(edit, Share) and edit.places[:2] == (Place("q", 0), Place("k", 0)) for edit in plan.edits)


def test_units_tell_what_was_solved_for_one_plan_from_another():
    spec, places = describe(CONFIGS["llama"]()), (Place("q", 0), Place("k", 0))
    shares = [
        Share(places, rank, side, private_rank=private, pivot=pivot)
        for rank in (4, 5)
        for side in ("input", "output")
        for private in (0, 2)
        for pivot in (False, True)
    ]
    names = [unit.name for share in shares for unit in make_method("svd").units(spec, (share,))]
    assert len(set(names)) == len(names) == 16
