"""Where a model departs from a plain pre-norm decoder."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

import layershare
from layershare.model.flow import Flow
from layershare.model.prenorm import NotPreNorm, SubLayer, find_prenorm
from tests.families import CONFIGS

_OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 56, "vocab_size": 160}


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


class Toy(nn.Module):
    """One pre-norm block without attention worth the name, with a flaw if asked for."""

    def __init__(self, flaw: str) -> None:
        super().__init__()
        self.flaw = flaw
        self.embedding, self.bias = nn.Embedding(10, 8), nn.Parameter(torch.ones(8))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.read, self.read_too, self.write, self.write_too = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = 3 * self.embedding(ids)
        if self.flaw == "scaled":
            x = x * self.bias
        if self.flaw == "moved":
            x = x + self.bias
        o = self.write(self.read(self.norms[0](x)))
        x = torch.add(x, o, alpha=2 if self.flaw == "alpha" else 1)
        if self.flaw == "gated":
            o = o * x.mean()
        o = self.write_too(self.read_too(self.norms[0 if self.flaw == "norm twice" else 1](x)))
        x = x + (o * self.bias if self.flaw == "layer scale" else 0.5 * o)
        x = x.clamp(-9, 9) if self.flaw == "clamped" else x
        return self.head(self.norms[2](x))


@pytest.mark.parametrize(
    ("flaw", "reason"),
    [
        ("", None),
        ("scaled", "'mul' stands between its embeddings"),
        ("moved", "'a tensor' stands between its embeddings"),
        ("alpha", "what 'write' writes is not simply added"),
        ("gated", "is used 2 times"),
        ("layer scale", "what 'write_too' writes is not simply added"),
        ("norm twice", "'norms.0' is called 2 times"),
        ("clamped", "are not read by one norm alone"),
    ],
)
def test_every_departure_from_pre_norm_is_noticed(flaw, reason):
    toy, flow = Toy(flaw), Flow()
    with flow.watching(toy), torch.no_grad():
        toy(torch.arange(4)[None])
    parts = [(["read"], "write"), (["read_too"], "write_too")]
    if reason is None:
        stream = find_prenorm(flow, "", parts, toy.head)
        assert stream.embeddings == ("embedding",)
        assert [part.multiplier for part in stream.sublayers] == [1, 0.5]
    else:
        with pytest.raises(NotPreNorm, match=reason):
            find_prenorm(flow, "", parts, toy.head)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"word_embed_proj_dim": 16}, "its last norm is not read by a linear output head alone"),
        ({"do_layer_norm_before": False, "word_embed_proj_dim": 32}, "no norm stands directly before"),
    ],
)
def test_variants_of_a_family_are_told_apart(options, reason):
    spec = layershare.describe(AutoConfig.for_model("opt", **_OPT, **options))
    assert isinstance(spec.prenorm, str)
    assert reason in spec.prenorm
