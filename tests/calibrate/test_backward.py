"""Gradients measured block by block are those of the whole model."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from layershare.calibrate.backward import Trail
from layershare.calibrate.stats import Statistic, calibrate
from layershare.calibrate.stream import Stream
from layershare.calibrate.text import load_text
from layershare.errors import LayershareError, UnsupportedModelError
from layershare.model.describe import describe
from layershare.model.weights import Weights
from tests.families import CONFIGS, tiny_model, tokens


@pytest.fixture
def text(tokenizer, words):
    return load_text(words, tokenizer, split="train", blocks=12, length=32)


def whole_gradients(model, spec, text):
    """By linear, the gradient of the summed loss at its output [rows, length, d_out], from one backward pass."""
    outputs = {}
    for linear in spec.linears:
        module = model.get_submodule(spec.base_prefix + linear.name)
        module.register_forward_hook(lambda module, args, output, name=linear.name: outputs.update({name: output}))
    logits = model(text.tokens).logits[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1), text.tokens[:, 1:].flatten(), reduction="sum")
    return dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_those_of_the_whole_model(family, text, tmp_path):
    model = tiny_model(family)
    spec = describe(model)
    model.save_pretrained(tmp_path / "model")
    on_disk = Weights.open(tmp_path / "model", tmp_path / "scratch")
    found = [
        calibrate(Weights.of(model), spec, text, tmp_path / "a", batch_size=5, kinds={"gradients"}),
        calibrate(on_disk, spec, text, tmp_path / "b", batch_size=5, kinds={"gradients"}, scratch=tmp_path / "scratch"),
    ]
    expected = whole_gradients(model, spec, text)
    for linear in spec.linears:
        seen = expected[linear.name].flatten(0, -2).double()
        gram = seen.T @ seen / len(seen)
        for stats in found:
            ours = stats.gradient_gram(linear).double()
            assert torch.linalg.norm(ours - gram) < 1e-4 * torch.linalg.norm(gram)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_pass_measures_all_and_what_is_there_stays(text, tmp_path):
    model = tiny_model("llama")
    spec, weights = describe(model), Weights.of(model)
    kinds: set[Statistic] = {"inputs", "gradients"}
    alone = calibrate(weights, spec, text, tmp_path / "alone", batch_size=4, kinds={"gradients"})
    stats = calibrate(weights, spec, text, tmp_path / "both", batch_size=4, kinds=kinds)
    for linear in spec.linears:
        assert torch.equal(stats.gradient_gram(linear), alone.gradient_gram(linear))
    assert stats.tokens == text.tokens.numel()
    (folder,) = (tmp_path / "both").iterdir()
    damaged, kept = folder / "gradients-002.safetensors", folder / "gradients-001.safetensors"
    before, time = damaged.read_bytes(), kept.stat().st_mtime_ns
    damaged.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    again = calibrate(weights, spec, text, tmp_path / "both", batch_size=4, kinds=kinds)
    assert all(again.has("gradients", layer) for layer in range(spec.n_layers))
    assert damaged.read_bytes() == before
    assert kept.stat().st_mtime_ns == time


def test_overflowing_gradients_are_named(text, tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(LayershareError, match="overflow"):
        calibrate(Weights.of(model), describe(model), text, tmp_path, batch_size=4, kinds={"gradients"})
    (folder,) = tmp_path.iterdir()
    assert not list(folder.glob("gradients-*"))


def test_models_in_lock_step_are_refused():
    stream = Stream(Weights.of(tiny_model("llama")), tokens(4), 2, lock_step=True)
    blocks = iter(stream)
    next(blocks)
    with pytest.raises(UnsupportedModelError, match="gradients"):
        Trail(stream).keep()
