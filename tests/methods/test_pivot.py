"""The option `pivot` of all low-rank methods: more rank at the same size, from the plan to what loads and trains."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import layershare
from layershare.methods import METHODS
from layershare.methods.low_rank import LowRank
from layershare.model.hub import load
from layershare.model.layers import ComposedLinear
from tests.families import OPTIONS, tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")
LOW_RANK = [name for name, method in METHODS.items() if issubclass(method, LowRank)]


def compressed(model: Any, tokenizer, words, method: str, folder, pivot: bool = True, **options: Any) -> Any:
    options = {"keep": 0.6, **OPTIONS.get(method, {}), **options}
    return layershare.compress(
        model,
        tokenizer,
        method=method,
        pivot=pivot,
        of="targets",
        refit=True if method == "basis-sharing" else "auto",
        text=words,
        blocks=24,
        length=32,
        folder=folder,
        **options,
    )


def pivoted(model: Any) -> list[ComposedLinear]:
    composed = [module for module in model.modules() if isinstance(module, ComposedLinear)]
    assert all(sum(factor.pivots is not None for factor in module.factors) == 1 for module in composed)
    return composed


@torch.no_grad()
def check(small: Any, folder, plan: dict[str, Any]) -> None:
    """What the plan says of sizes is what is there; it loads to the same bits, and its dense form computes the same."""
    assert sum(p.numel() for p in small.parameters()) == plan["after"]["all"]["parameters"]
    assert (folder / "model.safetensors").stat().st_size == plan["after"]["all"]["bytes"]
    assert plan["after"]["targets"]["parameters"] / plan["before"]["targets"]["parameters"] > 0.995 * 0.6
    expected = small(tokens()).logits
    auto_class: Any = AutoModelForCausalLM
    loaded, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded(tokens()).logits, expected)
    loaded.save_pretrained(folder.parent / "again")
    assert torch.equal(load(folder.parent / "again")(tokens()).logits, expected)
    torch.testing.assert_close(loaded.dequantize()(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", LOW_RANK)
def test_every_method(method, tmp_path, tokenizer, words):
    model = tiny_model("gpt2")
    options = {"beta": 0.1} if method == "d-rank" else {}
    plans, groups = {}, {}
    for pivot in (False, True):
        folder = tmp_path / str(pivot) / "small"
        small = compressed(model, tokenizer, words, method, folder, pivot, **options)
        plans[pivot] = json.loads((folder / "plan.json").read_text())
        groups[pivot] = json.loads((folder / "results.json").read_text())["groups"]
    check(small, tmp_path / "True" / "small", plans[True])  # pyright: ignore[reportPossiblyUnboundVariable]
    assert all(0 < facts["largest"] < 30 for facts in groups[True].values())
    assert "largest" not in next(iter(groups[False].values()))
    uniform = [each for each in groups[True] if each in groups[False]]
    if method not in ("asvd", "bolaco", "welore", "d-rank"):  # whose ranks follow what they measure
        assert all(groups[True][each]["rank"] > groups[False][each]["rank"] for each in uniform)
        assert all(groups[True][each]["error"] < groups[False][each]["error"] for each in uniform)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("method", ["basis-sharing", "svd-llm"])
def test_pivoting_loses_nothing(method, refit, tmp_path, tokenizer, words):
    """A plan with its ranks gives the same model in either form; refitted, up to a ridge that depends on the basis."""
    model = tiny_model("llama", dtype=torch.float64)
    plan = layershare.make_plan(model, method=method, keep=0.6, of="targets")
    dense = []
    for pivot in (False, True):
        values = json.loads(plan.to_json())
        values["edits"] = [{**edit, "pivot": pivot} for edit in values["edits"]]
        path = tmp_path / f"{pivot}.json"
        path.write_text(json.dumps(values))
        options = {"text": words, "blocks": 24, "length": 32, "plan": path, "method": method, "refit": refit}
        small = layershare.compress(model, tokenizer, **options)
        if pivot:
            pivoted(small)
        dense.append(small.dequantize().state_dict())
    for name, tensor in dense[0].items():
        lost = (dense[1][name] - tensor).norm() / tensor.norm()
        assert lost < (0.02 if refit else 1e-7), name
