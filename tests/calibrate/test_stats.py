import os

import pytest
import torch

from layershare.calibrate.stats import Stats, calibrate
from layershare.calibrate.text import load_text
from layershare.errors import LayershareError
from layershare.model.describe import describe
from layershare.model.weights import Weights
from tests.families import tiny_model


@pytest.fixture
def text(tokenizer, words):
    return load_text(words, tokenizer, split="train", blocks=12, length=32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "phi3", "falcon"])
def test_grams_are_the_sums_over_the_models_own_inputs(family, text, tmp_path):
    model = tiny_model(family)
    spec = describe(model)
    stats = calibrate(Weights.of(model), spec, text, tmp_path, batch_size=5)
    expected = {}

    def watch(name):
        def hook(module, args):
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            gram, magnitude = expected.get(name, (0, 0))
            expected[name] = (gram + x.T @ x, magnitude + x.abs().sum(0))

        return hook

    for linear in spec.linears:
        model.get_submodule(spec.base_prefix + linear.name).register_forward_pre_hook(watch(linear.name))
    with torch.no_grad():
        model(text.tokens)
    for linear in spec.linears:
        gram, magnitude = stats.gram(linear), stats.magnitude(linear)
        assert gram.dtype == magnitude.dtype == torch.float32
        torch.testing.assert_close(gram.double(), expected[linear.name][0], rtol=1e-4, atol=1e-3)
        mean = expected[linear.name][1] / text.tokens.numel()
        torch.testing.assert_close(magnitude.double(), mean, rtol=1e-4, atol=1e-6)


def test_cosines_and_pooled_states_are_those_of_the_models_own_hidden_states(text, tmp_path):
    model = tiny_model("llama")
    spec = describe(model)
    stats = calibrate(Weights.of(model), spec, text, tmp_path, batch_size=5, kinds={"blocks"})
    with torch.no_grad():
        states = model(text.tokens, output_hidden_states=True).hidden_states
    entered = []
    hook = model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(
        lambda _, args: entered.append(args[0])
    )
    with torch.no_grad():
        model(text.tokens)
    hook.remove()
    before, between, after = states[1], entered[0], states[2]
    pairs = (before, between), (between, after), (before, after)
    expected = [torch.cosine_similarity(x.double(), y.double(), dim=-1).mean().item() for x, y in pairs]
    measured = stats.cosines(1)
    assert [measured["attention"], measured["mlp"], measured["block"]] == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(stats.pooled(1), after[:, -1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fisher_rows_are_the_summed_squares_of_the_gradients(family, text, tmp_path):
    model = tiny_model(family)
    spec = describe(model)
    stats = calibrate(Weights.of(model), spec, text, tmp_path, batch_size=6, kinds={"fisher"})
    assert all(parameter.grad is None for parameter in model.parameters())
    squares = {linear.name: torch.zeros(linear.d_in) for linear in spec.linears}
    for tokens in text.tokens.split(1):  # whatever the batch size
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        for linear in spec.linears:
            gradient = model.get_parameter(spec.weight_name(linear)).grad
            assert gradient is not None
            squares[linear.name] += (gradient if linear.conv1d else gradient.T).square().sum(1) / 12
    for linear in spec.linears:
        torch.testing.assert_close(stats.fisher(linear), squares[linear.name], rtol=1e-4, atol=1e-12)


def test_finished_layers_are_reused_damaged_ones_measured_again_to_the_same_bits(text, tmp_path):
    model = tiny_model("llama")
    spec, weights = describe(model), Weights.of(model)
    calibrate(weights, spec, text, tmp_path, batch_size=4)
    (folder,) = tmp_path.iterdir()
    files = sorted(folder.glob("inputs-*.safetensors"))
    assert len(files) == spec.n_layers
    original = [file.read_bytes() for file in files]
    times = [file.stat().st_mtime_ns for file in files]
    files[1].write_bytes(original[1][:-10])
    files[2].write_bytes(original[2][:-1] + bytes([original[2][-1] ^ 1]))
    calibrate(weights, spec, text, tmp_path, batch_size=4)
    assert [file.read_bytes() for file in files] == original
    assert [file.stat().st_mtime_ns == time for file, time in zip(files, times, strict=True)] == [
        True,
        False,
        False,
        True,
    ]


def test_another_model_or_text_has_statistics_of_its_own(text, tokenizer, words, tmp_path):
    model = tiny_model("llama")
    spec = describe(model)
    calibrate(Weights.of(model), spec, text, tmp_path, batch_size=4)
    calibrate(Weights.of(tiny_model("llama", seed=1)), spec, text, tmp_path, batch_size=4)
    other = load_text(words, tokenizer, split="train", blocks=11, length=32)
    calibrate(Weights.of(model), spec, other, tmp_path, batch_size=4)
    assert len(list(tmp_path.iterdir())) == 3


def test_fewer_tokens_than_inputs_warn(tokenizer, words, tmp_path):
    model = tiny_model("llama")
    short = load_text(words, tokenizer, split="train", blocks=1, length=40)
    with pytest.warns(UserWarning, match="40 tokens, fewer than the 56 inputs of 'layers.0.mlp.down_proj'"):
        calibrate(Weights.of(model), describe(model), short, tmp_path, batch_size=4)


def test_weights_and_inputs_that_are_not_finite_are_named(text, tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.up_proj.weight")[3, 4] = torch.nan
    with pytest.raises(LayershareError, match=r"'model.layers.2.mlp.up_proj.weight' contain NaN"):
        calibrate(Weights.of(model), describe(model), text, tmp_path, batch_size=4)
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1e38)
    with pytest.raises(LayershareError, match=r"inputs of 'layers.1.mlp.down_proj' overflow"):
        calibrate(Weights.of(model), describe(model), text, tmp_path, batch_size=4)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(1e38)
    with pytest.raises(LayershareError, match=r"hidden states of 'layers.1' overflow"):
        calibrate(Weights.of(model), describe(model), text, tmp_path, batch_size=4, kinds={"blocks"})


def test_a_folder_that_can_only_be_read_serves_what_is_whole(text, tmp_path, monkeypatch):
    weights = Weights.of(tiny_model("llama"))
    spec, files = describe(weights.model), {}
    for readable in (False, True):
        if readable:
            monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may always write
        stats = calibrate(weights, spec, text, tmp_path, batch_size=6, kinds={"inputs"})
        assert stats.gram(spec.linears[0]).shape == (32, 32)
        files[readable] = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert files[True] == files[False]
    with pytest.raises(LayershareError, match="have no gradients of some layers"):
        calibrate(weights, spec, text, tmp_path, batch_size=6, kinds={"inputs", "gradients"})


def test_a_damaged_manifest_counts_as_no_statistics(text, tmp_path):
    weights = Weights.of(tiny_model("llama"))
    calibrate(weights, describe(weights.model), text, tmp_path, batch_size=6)
    assert Stats.find(tmp_path, weights.fingerprint)
    (manifest,) = tmp_path.glob("*/manifest.json")
    manifest.write_text("{")
    with pytest.raises(LayershareError, match="statistics of this model on 0 texts"):
        Stats.find(tmp_path, weights.fingerprint)
