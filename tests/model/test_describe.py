import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from layershare.errors import UnsupportedModelError
from layershare.model.describe import describe, role_of
from tests.families import CONFIGS, LAYERS, tiny_model

ROLES = {
    "phi3": ("qkv", "o", "gate_up", "down"),
    "gpt2": ("qkv", "o", "up", "down"),
    "gpt_neox": ("qkv", "o", "up", "down"),
    "bloom": ("qkv", "o", "up", "down"),
    "falcon": ("qkv", "o", "up", "down"),
    "opt": ("q", "k", "v", "o", "up", "down"),
    "gptj": ("q", "k", "v", "o", "up", "down"),
    "phi": ("q", "k", "v", "o", "up", "down"),
    "starcoder2": ("q", "k", "v", "o", "up", "down"),
    "glm4": ("q", "k", "v", "o", "gate_up", "down"),
}
# q, k and v read one tensor; where attention and MLP run side by side, the MLP reads it too.
SITES = {"gptj": 3, "phi": 3, "cohere": 3, "gpt2": 4, "falcon": 4}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_described_as_it_is_built(family):
    spec = describe(CONFIGS[family]())
    model = tiny_model(family)
    assert spec.roles == ROLES.get(family, ("q", "k", "v", "o", "gate", "up", "down"))
    assert spec.n_layers == LAYERS
    assert spec.parameters == sum(p.numel() for p in model.parameters())
    state = model.state_dict()
    modules = dict(model.named_modules())
    assert {name: tuple(state[name].shape) for name in spec.tensors} == {n: s for n, (s, _) in spec.tensors.items()}
    for linear in spec.linears:
        weight = state[spec.weight_name(linear)]
        assert (linear.d_in, linear.d_out) == tuple(weight.shape if linear.conv1d else weight.T.shape)
        assert linear.bias == (modules[f"{spec.base_prefix}{linear.name}"].bias is not None)
    assert len({linear.site for linear in spec.linears}) == SITES.get(family, 4) * LAYERS


@pytest.mark.parametrize("family", CONFIGS)
def test_linears_of_one_site_read_the_same_input(family):
    model, spec = tiny_model(family), describe(CONFIGS[family]())
    seen = {}
    for linear in spec.linears:
        module = model.get_submodule(f"{spec.base_prefix}{linear.name}")
        module.register_forward_pre_hook(lambda _, args, name=linear.name: seen.__setitem__(name, args[0].clone()))
    with torch.no_grad():
        model(torch.arange(3, 15)[None])
    for linear in spec.linears:
        assert torch.equal(seen[linear.name], seen[linear.site])


def test_a_config_and_its_model_are_described_alike_and_dtype_comes_from_the_model():
    model = tiny_model("llama", dtype=torch.bfloat16)
    spec = describe(model)
    assert spec.linears == describe(model.config).linears
    assert {dtype for _, dtype in spec.tensors.values()} == {torch.bfloat16}


def test_grouped_query_attention_is_seen():
    assert describe(CONFIGS["llama"]()).grouped_query
    assert not describe(AutoConfig.for_model("opt")).grouped_query


def test_a_large_model_is_described_without_its_memory():
    config = AutoConfig.for_model("llama", hidden_size=8192, num_hidden_layers=80, intermediate_size=28672)
    assert 60e9 < describe(config).parameters < 90e9


def test_the_role_of_a_name():
    assert role_of("h.0.attn.c_proj") == "o"
    assert role_of("h.0.mlp.c_proj") == "down"
    assert role_of("layers.0.self_attn.dense") == "o"
    assert role_of("layers.0.conv.out_proj") is None
    assert role_of("layers.0.router") is None


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mixtral", "mixture-of-experts"),
        ("qwen3_moe", "mixture-of-experts"),
        ("t5", "encoder-decoder"),
        ("mamba2", "state-space"),
        ("rwkv", "not those of an attention decoder"),
        ("bert", "not those of an attention decoder"),
        ("gemma3", "multimodal"),
        ("vit", "not a causal language model"),
    ],
)
def test_other_kinds_of_model_are_refused_with_the_reason(kind, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        describe(AutoConfig.for_model(kind))


def test_compressed_and_quantized_models_are_refused():
    config = CONFIGS["llama"]()
    config.quantization_config = {"quant_method": "layershare"}
    with pytest.raises(UnsupportedModelError, match="already compressed"):
        describe(config)
    config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(UnsupportedModelError, match="quantized with 'awq'"):
        describe(config)


def test_describing_leaves_no_memory_behind():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    describe(model)
    assert all(p.is_meta for p in model.parameters())
