"""Rotary positions that are made for longer texts: some look at the text's length while they run."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

import layershare
from layershare.calibrate.stream import Stream
from layershare.model.describe import describe
from layershare.model.weights import Weights
from tests.calibrate.test_stream import TEXT, assert_exact, opened, real_outputs, streamed_outputs
from tests.families import CONFIGS

ROPE: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama", {"factor": 2.0}),
    "linear": ("llama", {"factor": 2.0}),
    "yarn": ("llama", {"factor": 2.0, "original_max_position_embeddings": 16}),
    "llama3": (
        "llama",
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "longrope": (
        "phi3",
        {"factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16},
    ),
}


def config_of(kind: str) -> PreTrainedConfig:
    """A tiny config whose positions are stretched from 32, or 16, tokens on, which is less than the texts have."""
    family, more = ROPE[kind]
    config = CONFIGS[family]()
    config.max_position_embeddings = 32 if kind == "dynamic" else 64
    config.rope_parameters = {**config.rope_parameters, "rope_type": kind, **more}
    return config


def model_of(kind: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(kind)).eval()


@pytest.mark.parametrize("kind", ROPE)
def test_is_described_as_with_plain_positions(kind):
    spec, plain = describe(config_of(kind)), describe(CONFIGS[ROPE[kind][0]]())
    assert spec == plain


@pytest.mark.parametrize("kind", ROPE)
def test_blocks_compute_what_they_do_in_the_model(kind, tmp_path):
    expected = real_outputs(model_of(kind))
    for weights in (Weights.of(model_of(kind)), opened(model_of(kind), tmp_path)):
        assert_exact(streamed_outputs(Stream(weights, TEXT, batch_size=2)), expected)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_compresses_loads_and_heals(kind, tokenizer, words, tmp_path):
    model, options = model_of(kind), {"text": words, "length": 32}
    small = layershare.compress(
        model, tokenizer, method="basis-sharing", keep=0.6, of="targets", blocks=8, folder=tmp_path / "small", **options
    )
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        assert torch.equal(again(TEXT).logits, small(TEXT).logits)
    ours = layershare.measure(small, tokenizer, original=model, blocks=4, **options)
    assert ours.kl is not None
    assert 0 < ours.kl < 1
    healed = layershare.heal(small, tokenizer, teacher=model, train="factors", tokens=256, batch_size=2, **options)
    changed = (healed(TEXT).logits - small(TEXT).logits).abs().max().item()
    assert 0 < changed < 1
