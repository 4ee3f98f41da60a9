"""Which parameters are those of norms, and what kind of norm a module is."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from layershare.healing.parameters import choose
from layershare.healing.settings import Healing
from layershare.model.arch import find_blocks
from layershare.model.norms import UnknownNorm, affine, norm_kind, norm_parameters
from tests.families import tiny_model


def test_norms_of_a_block():
    names = norm_parameters(find_blocks(tiny_model("gpt2"))[1][0])
    assert names == ["ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"]


def test_an_activation_that_is_learned_is_no_norm():
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"vocab_size": 160, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("apertus", **sizes, **special))
    of_blocks = {f"model.layers.{i}.{name}" for i in (0, 1) for name in norm_parameters(model.model.layers[i])}
    norms = {name for name, parameter in model.named_parameters() if parameter.ndim == 1 and "norm" in name}
    assert "model.layers.0.mlp.act_fn.alpha_p" in dict(model.named_parameters())
    assert of_blocks == norms - {"model.norm.weight"}
    trained = choose(model, Healing(model="a folder", train="norms"))
    assert {name for name, parameter in trained.named_parameters() if parameter.requires_grad} == norms


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
    with pytest.raises(UnknownNorm, match="its norm "):
        norm_kind(module, 32)
