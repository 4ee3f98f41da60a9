"""What kind of norm a module is, and where a model departs from a plain pre-norm decoder."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import layershare
from layershare.model.prenorm import NotPreNorm, SubLayer, affine, norm_kind
from tests.families import CONFIGS

_OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 56, "vocab_size": 160}


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (LlamaRMSNorm(32, 1e-6), (False, False, 1e-6)),
        (GemmaRMSNorm(32, 1e-5), (False, False, 1e-5)),
        (nn.RMSNorm(32, eps=2e-8), (False, False, 2e-8)),
        (nn.LayerNorm(32, eps=1e-5), (True, True, 1e-5)),
        (nn.LayerNorm(32, eps=1e-3, bias=False), (True, False, 1e-3)),
        (nn.LayerNorm(32, elementwise_affine=False), (True, False, 1e-5)),
    ],
)
def test_a_norm_is_known_by_what_it_computes(module, kind):
    assert norm_kind(module, 32) == kind
    draw = torch.Generator().manual_seed(0)
    parameters = {name: torch.randn(p.shape, generator=draw) for name, p in module.named_parameters()}
    module.load_state_dict(parameters)
    scale, shift = affine(module, parameters, 32)
    x = torch.randn(32, generator=draw)
    moved = x - x.mean() if kind[0] else x
    expected = scale * moved * torch.rsqrt(moved.square().mean() + kind[2]) + shift
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", [nn.GroupNorm(4, 32), nn.Tanh(), nn.Identity(), nn.Linear(32, 32)])
def test_what_is_no_norm_is_refused(module):
    with pytest.raises(NotPreNorm, match="its norm "):
        norm_kind(module, 32)


def test_a_residual_stream_is_found():
    config: Any = CONFIGS["granite"]()
    config.residual_multiplier = 0.22
    stream = layershare.describe(config).sliceable()
    assert stream.embeddings == ("embed_tokens",)
    assert len(stream.sublayers) == 8
    assert stream.sublayers[2] == SubLayer(
        "layers.1.input_layernorm",
        tuple(f"layers.1.self_attn.{name}_proj" for name in "qkv"),
        "layers.1.self_attn.o_proj",
        0.22,
    )
    assert (stream.final_norm, stream.head, stream.vocabulary, stream.width) == ("norm", "lm_head", 160, 32)
    assert layershare.describe(CONFIGS["gpt2"]()).sliceable().embeddings == ("wte", "wpe")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"word_embed_proj_dim": 16}, "its last norm is not read by a linear output head alone"),
        ({"do_layer_norm_before": False, "word_embed_proj_dim": 32}, "no norm stands directly before"),
    ],
)
def test_variants_of_a_family_are_told_apart(options, reason):
    spec = layershare.describe(AutoConfig.for_model("opt", **_OPT, **options))
    assert isinstance(spec.stream, str)
    assert reason in spec.stream
