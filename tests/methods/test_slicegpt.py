"""SliceGPT: rotations change nothing, slices follow the principal components, plans keep to the budget."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import layershare
from layershare.calibrate.text import load_text
from layershare.errors import LayershareError, UnsupportedModelError
from layershare.methods.slicegpt.slicing import reading, shortcut, writing
from layershare.plan.budget import measure
from layershare.plan.edits import Drop, Slice, check
from layershare.recipe import Recipe, make_recipe
from layershare.run import run
from tests.families import CONFIGS, LAYERS, NOT_SLICED, WIDTH, tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")
TEXT: dict[str, Any] = {"blocks": 24, "length": 32}


def sliced_to(width: int, model: Any, tokenizer, words, folder: Path) -> Any:
    """The model sliced to a width, as loaded from a folder written by a run."""
    plan = json.loads(layershare.make_plan(model, method="slicegpt", keep=0.7).to_json())
    plan["edits"] = [{"kind": "slice", "width": width}]
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan))
    return layershare.compress(
        model, tokenizer, method="slicegpt", plan=folder / "plan.json", text=words, folder=folder / "small", **TEXT
    )


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    return model(tokens() if ids is None else ids).logits


@pytest.mark.parametrize("family", [*(f for f in CONFIGS if f not in NOT_SLICED), "multiplied"])
def test_rotation_alone_changes_nothing(family, tmp_path, tokenizer, words):
    if family == "multiplied":
        config: Any = CONFIGS["granite"]()
        config.update({"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0})
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    else:
        model = tiny_model(family)
    rotated = sliced_to(WIDTH, model, tokenizer, words, tmp_path / "a")
    torch.testing.assert_close(logits(rotated), logits(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rotated.get_input_embeddings().weight, model.get_input_embeddings().weight, atol=0.01)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_null_space_is_sliced_without_loss(family, tmp_path, tokenizer, words):
    """Where embeddings and writers reach only 20 dimensions, 20 components are the whole model."""
    model = tiny_model(family)
    axes = torch.linalg.qr(torch.randn(WIDTH, 20, generator=torch.Generator().manual_seed(1)))[0]
    projection = axes @ axes.T
    if family == "gpt2":  # the mean of the hidden states is not seen by LayerNorm, so it may lie anywhere
        projection = projection + 1 / WIDTH
    spec = layershare.describe(model)
    stream = spec.sliceable()
    with torch.no_grad():
        for name in stream.embeddings:
            weight = model.base_model.get_submodule(name).get_parameter("weight")
            weight.copy_(weight @ projection)
        for part in stream.sublayers:
            writer: Any = model.base_model.get_submodule(part.writer)
            turned = writer.weight @ projection if family == "gpt2" else projection @ writer.weight
            writer.weight.copy_(turned)
            if writer.bias is not None:
                writer.bias.copy_(writer.bias @ projection)
    width = 21 if family == "gpt2" else 20
    small = sliced_to(width, model, tokenizer, words, tmp_path / "a")
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-3, atol=1e-4)
    smaller = sliced_to(width - 4, model, tokenizer, words, tmp_path / "b")
    assert (logits(smaller) - logits(model)).abs().max() > 0.01


def test_each_slice_is_the_principal_components_of_the_model_sliced_up_to_there(tmp_path, tokenizer, words):
    """The paper's procedure with explicit projections on all of the text at once, in float64."""
    width = 22
    model: Any = tiny_model("llama", dtype=torch.float64)
    ids = load_text(words, tokenizer, split="train", **TEXT).tokens
    small = sliced_to(width, model, tokenizer, words, tmp_path / "a")

    def projected(x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        lost.append((values[:-width].sum() / values.sum()).item())
        top = vectors[:, -width:]
        return x @ top @ top.T

    lost: list[float] = []
    base = model.model
    with torch.no_grad():
        x = projected(base.embed_tokens(ids))
        rotary = base.rotary_emb(x, torch.arange(ids.shape[1])[None])
        for block in base.layers:
            attended, _ = block.self_attn(block.input_layernorm(x), position_embeddings=rotary, attention_mask=None)
            x = projected(x + attended)
            x = projected(x + block.mlp(block.post_attention_layernorm(x)))
        expected = model.lm_head(base.norm(x))
    torch.testing.assert_close(logits(small, ids), expected, rtol=1e-3, atol=1e-5)
    results = json.loads((tmp_path / "a" / "small" / "results.json").read_text())
    assert [each["error"] for each in results["groups"].values()] == pytest.approx(lost, rel=1e-3, abs=1e-6)


def test_what_is_absorbed_by_readers_and_writers():
    """norm(x)W + b and its sliced form agree, for LayerNorm, in any orthogonal basis."""
    draw = torch.Generator().manual_seed(0)
    x, scale, shift = (torch.randn(*shape, 8, generator=draw, dtype=torch.float64) for shape in ((5,), (), ()))
    before, after = (torch.linalg.qr(torch.randn(8, 8, generator=draw, dtype=torch.float64))[0] for _ in range(2))
    reader = torch.randn(8, 3, generator=draw, dtype=torch.float64), torch.randn(3, generator=draw).double()
    writer = torch.randn(3, 8, generator=draw, dtype=torch.float64), torch.randn(8, generator=draw).double()
    z = torch.randn(5, 3, generator=draw, dtype=torch.float64)

    def normed(x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, (8,), scale, shift)

    turned, _ = writing((x, None), True, before)
    weight, bias = reading(reader, scale, shift, before)
    plain = turned * torch.rsqrt(turned.square().mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(plain @ weight + bias, normed(x) @ reader[0] + reader[1])

    weight, bias = writing(writer, True, after)
    assert bias is not None
    added = turned + 0.5 * (z @ weight + bias + turned @ shortcut(before, after, 0.5))
    expected = x + 0.5 * (z @ writer[0] + writer[1])
    torch.testing.assert_close(normed(added @ after.T), normed(expected))


@pytest.mark.parametrize("family", NOT_SLICED)
def test_families_that_it_does_not_fit_are_refused_before_anything_is_computed(family):
    reason = f"A '{family}' model cannot be sliced, because .*{NOT_SLICED[family]}"
    with pytest.raises(UnsupportedModelError, match=reason):
        layershare.make_plan(CONFIGS[family](), method="slicegpt")


@pytest.mark.parametrize("of", ["all", "targets"])
def test_the_widest_slice_within_the_budget(of):
    model = tiny_model("llama")
    spec = layershare.describe(model)
    plan = layershare.make_plan(model, method="slicegpt", keep=0.7, of=of)
    (edit,) = plan.edits
    assert isinstance(edit, Slice)
    wider = measure(spec, (Slice(edit.width + 1),))
    sizes = [getattr(each, of).parameters for each in (plan.after, wider, plan.before)]
    assert sizes[0] <= 0.7 * sizes[2] < sizes[1]
    (even,) = layershare.make_plan(model, method="slicegpt", keep=0.7, of=of, round_to=4).edits
    assert even == Slice(edit.width // 4 * 4)
    bytes_ = layershare.make_plan(model, method="slicegpt", keep="120KB").after.all.bytes
    assert 110_000 < bytes_ <= 120_000


def test_large_models_get_widths_of_multiples_of_8_and_use_the_budget():
    config = AutoConfig.for_model(
        "llama", hidden_size=2048, num_hidden_layers=2, num_attention_heads=16, intermediate_size=5632, vocab_size=1000
    )
    plan = layershare.make_plan(config, method="slicegpt", keep=0.8)
    (edit,) = plan.edits
    assert isinstance(edit, Slice)
    assert edit.width % 8 == 0
    assert 0.995 * 0.8 <= plan.after.all.parameters / plan.before.all.parameters <= 0.8


def test_nothing_is_done_for_keep_1_and_too_little_is_refused():
    model = tiny_model("llama")
    assert layershare.make_plan(model, method="slicegpt", keep=1).edits == ()
    with pytest.raises(LayershareError, match="Slicing alone cannot make this model so small"):
        layershare.make_plan(model, method="slicegpt", keep=0.3, of="targets", round_to=16)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ((Slice(33),), "hidden states have 32"),
        ((Slice(0),), "width 0"),
        ((Slice(20), Drop("mlp", (1,))), "no other edits"),
        ((Slice(20), Slice(10)), "no other edits"),
    ],
)
def test_slices_that_do_not_fit_are_refused(edits, message):
    with pytest.raises(LayershareError, match=message):
        check(layershare.describe(tiny_model("llama")), edits)


def test_an_untied_head_is_counted():
    config: Any = CONFIGS["llama"]()
    config.tie_word_embeddings = True
    plan = layershare.make_plan(config, method="slicegpt", keep=0.9)
    spec = layershare.describe(config)
    (edit,) = plan.edits
    assert isinstance(edit, Slice)
    assert "lm_head.weight" not in spec.tensors
    outside = plan.after.all.parameters - plan.after.targets.parameters
    assert outside == 2 * 160 * edit.width


@pytest.fixture
def recipe(tmp_path, tokenizer, words) -> Recipe:
    """A recipe that slices a tiny tied model on disk."""
    config: Any = CONFIGS["gpt2"]()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n".join(words))
    calibration = {"text": str(tmp_path / "text.txt"), "batch_size": 2, **TEXT}
    values = {"model": str(tmp_path / "dense"), "method": "slicegpt", "keep": 0.7, "calibration": calibration}
    return make_recipe(values)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, LAYERS - 1])
def test_interrupted_and_in_memory_runs_give_the_same_bits(at, recipe, tmp_path):
    run(recipe, tmp_path / "whole")

    def announce(step: str):
        def progress(done: int, total: int) -> None:
            if step == "solve" and done == at:
                raise _Killed

        return progress

    card = (tmp_path / "whole" / "README.md").read_text()
    assert "all hidden states sliced to" in card
    assert "--to dense" not in card

    with pytest.raises(_Killed):
        run(recipe, tmp_path / "killed", announce=announce)
    units = (tmp_path / "killed" / ".run" / "units").glob("*.safetensors")
    finished = sorted(path.stem.partition(".")[2] for path in units)
    assert finished == ["embeddings", *(f"layer-{layer:03d}" for layer in range(at))]
    run(recipe, tmp_path / "killed")
    dense = tmp_path / "dense"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(dense), AutoTokenizer.from_pretrained(dense)
    run(recipe, tmp_path / "memory", model=model, tokenizer=tokenizer)
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == expected
    assert (tmp_path / "memory" / "model.safetensors").read_bytes() == expected
