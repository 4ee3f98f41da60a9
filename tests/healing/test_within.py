import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import layershare
from layershare.calibrate.text import load_text
from layershare.errors import LayershareError
from layershare.healing.within import training_text
from layershare.job import load_and_hold_out
from layershare.model.layers import ComposedLinear
from layershare.recipe import Recipe, make_recipe
from layershare.run import run
from tests.families import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")

REFINE = {"epochs": 2, "batch_size": 4}
DISTILL = {"tokens": 8192, "batch_size": 4, "lr": 0.02}


def recipe_for(folder: Path, **changes) -> Recipe:
    text = {"text": str(folder.parent / "text.txt"), "blocks": 8, "length": 64, "batch_size": 2, "held_out": 8}
    return make_recipe(
        {
            "model": str(folder),
            "method": "basis-sharing",
            "keep": 0.5,
            "of": "targets",
            "calibration": text,
            "effort": "distill",
            "refine": REFINE,
            "distill": DISTILL,
            **changes,
        }
    )


def changed(one: Path, other: Path) -> set[str]:
    ours, theirs = (AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (one, other))
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


def test_all_factors_become_better_and_nothing_else_changes(folder, tmp_path):
    results = run(recipe_for(folder), tmp_path / "out")
    noted, found = results.distill, results.held_out
    assert noted is not None
    assert found is not None
    assert noted.kept
    assert found.kl["distilled"] < found.kl["refined"]
    assert (noted.steps, noted.tokens) == (32, 8192)
    assert 0 < noted.best <= 32
    run(recipe_for(folder, effort="blocks", distill=None), tmp_path / "refined")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    composed = [(name, module) for name, module in model.named_modules() if isinstance(module, ComposedLinear)]
    factors = {f"{name}.{child}.weight" for name, module in composed for child, _ in module.named_children()}
    assert changed(tmp_path / "refined", tmp_path / "out") == factors
    written = json.loads((tmp_path / "out" / "results.json").read_text())["distill"]
    assert written["settings"] == DISTILL


def test_in_memory_from_disk_and_resumed_give_the_same_bytes(folder, tmp_path, tokenizer):
    recipe = recipe_for(folder)
    run(recipe, tmp_path / "memory", model=tiny_model("llama"), tokenizer=tokenizer)

    def stop(step: str):
        def progress(done: int, total: int) -> None:
            if step == "distill" and done == total // 2:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "stopped", announce=stop)
    assert [*(tmp_path / "stopped" / ".run").glob("training-*/checkpoint-*")]
    run(recipe, tmp_path / "stopped")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "stopped")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "stopped" / ".run").exists()


def test_what_does_not_help_is_not_kept(folder, tmp_path):
    """A rate that wrecks the model."""
    results = run(recipe_for(folder, distill={**DISTILL, "lr": 3.0}), tmp_path / "wild")
    assert results.distill is not None
    assert not results.distill.kept
    assert results.held_out is not None
    assert results.held_out.kl["distilled"] > results.held_out.kl["refined"]
    run(recipe_for(folder, effort="blocks", distill=None), tmp_path / "refined")
    assert not changed(tmp_path / "refined", tmp_path / "wild")


def test_held_out_blocks_are_not_trained_on(folder, tokenizer):
    recipe = recipe_for(folder)
    config = tiny_model("llama").config
    calibration, held_out = load_and_hold_out(recipe.calibration, tokenizer, config)
    text = training_text(recipe, tokenizer, config, None, calibration, held_out)
    whole = load_text(recipe.calibration.text, tokenizer, split="train", blocks=None, length=64)
    assert torch.equal(text.tokens[-8:], held_out.tokens)
    assert torch.equal(text.tokens[:8], calibration.tokens)
    ours, all_blocks = ({tuple(block) for block in each.tokens.tolist()} for each in (text, whole))
    assert ours == all_blocks
    assert not {tuple(block) for block in text.tokens[:-8].tolist()} & {tuple(b) for b in held_out.tokens.tolist()}


@pytest.mark.parametrize(
    ("method", "options"), [("delta", {"protect": 0, "unit": "both"}), ("auto", {"compare": False})]
)
def test_other_methods(method, options, tokenizer, words, tmp_path):
    small = layershare.compress(
        tiny_model("llama"),
        tokenizer,
        method=method,
        keep=0.7,
        text=words,
        blocks=16,
        length=32,
        effort="distill",
        refine=REFINE,
        distill=DISTILL,
        folder=tmp_path / "out",
        **options,
    )
    assert small.dtype == torch.float32
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["distill"]["steps"] == 64
    kl = found["held_out"]["kl"]
    before = min(kl[label] for label in ("own", "refitted", "refined") if label in kl)
    assert found["distill"]["kept"] == (kl["distilled"] < before)


def test_what_was_distilled_is_quantized(folder, tmp_path):
    results = run(recipe_for(folder, quantize={"bits": 8, "group": 16}), tmp_path / "out")
    assert results.held_out is not None
    assert list(results.held_out.kl)[-2:] == ["distilled", "quantized"]
    assert results.held_out.kl["quantized"] == pytest.approx(results.held_out.kl["distilled"], rel=0.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distill": {"batch_size": 1000}}, r"too few .* a smaller distill\.batch_size or calibration\.length"),
        ({"distill": {"tokens": 10**11}}, r"would see .* blocks of text, .*; lower distill\.tokens"),
        ({"method": "svd", "keep": 1}, "there are no factors to train; set effort=closed"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(changes, said, folder, tmp_path):
    with pytest.raises(LayershareError, match=said):
        run(recipe_for(folder, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
