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
DISTILL = {"tokens": 2048, "batch_size": 4, "lr": 0.02}


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


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer, words) -> Path:
    """A folder with a tiny model, a text, and it refined, and distilled in memory."""
    place = tmp_path_factory.mktemp("within")
    tiny_model("llama").save_pretrained(place / "dense")
    tokenizer.save_pretrained(place / "dense")
    (place / "text.txt").write_text("\n".join(words))
    run(recipe_for(place / "dense", effort="blocks", distill=None), place / "refined")
    run(recipe_for(place / "dense"), place / "memory", model=tiny_model("llama"), tokenizer=tokenizer)
    return place


def test_all_factors_become_better_and_nothing_else_changes(place):
    results = json.loads((place / "memory" / "results.json").read_text())
    noted, found = results["distill"], results["held_out"]["kl"]
    assert noted["kept"]
    assert found["distilled"] < found["refined"]
    assert (noted["settings"], noted["steps"], noted["tokens"]) == (DISTILL, 8, 2048)
    assert 0 < noted["best"] <= 8
    model = AutoModelForCausalLM.from_pretrained(place / "memory")
    composed = [(name, module) for name, module in model.named_modules() if isinstance(module, ComposedLinear)]
    factors = {f"{name}.{child}.weight" for name, module in composed for child, _ in module.named_children()}
    assert changed(place / "refined", place / "memory") == factors


def test_from_disk_and_resumed_give_the_same_bytes(place, tmp_path):
    recipe = recipe_for(place / "dense")

    def stop(step: str):
        def progress(done: int, total: int) -> None:
            if step == "distill" and done == total // 2:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "stopped", announce=stop)
    assert [*(tmp_path / "stopped" / ".run").glob("training-*/checkpoint-*")]
    run(recipe, tmp_path / "stopped")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (place / "memory", tmp_path / "stopped")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "stopped" / ".run").exists()


def test_what_does_not_help_is_not_kept(place, tmp_path):
    """A rate that wrecks the model."""
    results = run(recipe_for(place / "dense", distill={**DISTILL, "lr": 3.0}), tmp_path / "wild")
    assert results.distill is not None
    assert not results.distill.kept
    assert results.distill.best == 0
    assert not changed(place / "refined", tmp_path / "wild")


def test_what_diverges_is_not_kept(place, tmp_path):
    with pytest.warns(UserWarning, match="Distilling diverged and is left out; set a smaller distill.lr"):
        results = run(recipe_for(place / "dense", distill={**DISTILL, "lr": 1e30}), tmp_path / "wild")
    assert results.distill is not None
    assert (results.distill.kept, results.distill.best) == (False, 0)
    assert not changed(place / "refined", tmp_path / "wild")


def test_steps_grow_with_what_is_removed(place, tmp_path):
    model = tiny_model("llama")
    rates, before = [], torch.get_rng_state()
    for keep in (0.8, 0.6):
        recipe = recipe_for(place / "dense", keep=keep, distill={"tokens": 256, "batch_size": 4})
        noted = run(recipe, tmp_path / str(keep)).distill
        assert noted is not None
        rates.append(noted.lr)
    assert rates[0] == pytest.approx(0.03 * 0.2 / model.config.hidden_size**0.5, rel=0.05)
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.05)
    assert torch.equal(torch.get_rng_state(), before)


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
    assert found["distill"]["steps"] == 16
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
        ({"method": "shortgpt"}, "'shortgpt' makes no factors that could be trained; set effort=closed"),
        (
            {"method": "delta", "keep": 0.9, "options": {"init": "random", "protect": 1}},
            "all deltas are zero: set effort=closed",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(changes, said, folder, tmp_path):
    with pytest.raises(LayershareError, match=said):
        run(recipe_for(folder, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
