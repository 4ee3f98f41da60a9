import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import layershare
from layershare.errors import LayershareError
from layershare.model.hub import (
    FORMAT_VERSION,
    LayershareConfig,
    load,
    save,
)
from layershare.model.layers import ComposedLinear, FactorLinear, SharedBasis, SharedDense
from layershare.model.swap import Anchored, Group, swap_modules
from tests.families import CONFIGS, tiny_model, tokens
from tests.model.small import adopt, compressed, logits, some_groups


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Any, Path]:
    """A compressed Llama and its folder."""
    folder = tmp_path_factory.mktemp("llama")
    model = compressed("llama")
    model.save_pretrained(folder)
    return model, folder


def edited(folder: Path, to: Path, config=None, tensors=None) -> Path:
    """A copy of a model folder with its quantization_config and its tensors changed by the given functions."""
    shutil.copytree(folder, to)
    if config:
        content = json.loads((to / "config.json").read_text())
        config(content["quantization_config"])
        (to / "config.json").write_text(json.dumps(content))
    if tensors:
        state = load_file(to / "model.safetensors")
        tensors(state)
        save_file(state, to / "model.safetensors", {"format": "pt"})
    return to


def reported(auto_class: Any, folder: Path, **options: Any) -> tuple[Any, dict[str, set]]:
    """The loaded model and transformers' report of missing and unexpected keys."""
    return auto_class.from_pretrained(folder, output_loading_info=True, **options)


def stored(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  # not a mapping


@pytest.mark.parametrize("family", CONFIGS)
def test_save_load_save_and_dense_export(family, tmp_path):
    model = compressed(family)
    groups = model.hf_quantizer.groups
    model.save_pretrained(tmp_path / "first")
    loaded, info = reported(AutoModelForCausalLM, tmp_path / "first")
    assert not any(info.values()), info
    assert torch.equal(logits(model), logits(loaded))

    loaded.save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()

    names = stored(tmp_path / "first")
    assert sum(name.endswith(".basis.weight") for name in names) == len(groups)
    assert sum(name.endswith(".coef.weight") for name in names) == sum(len(group.members) for group in groups)
    deltas = model.hf_quantizer.edits.deltas
    assert sum(name.endswith(".base.weight") for name in names) == len(deltas) > 0
    for part in ("down", "up"):
        count = sum(len(anchored.members) for anchored in deltas)
        assert sum(name.endswith(f".{part}.weight") for name in names) == count
    assert names.pop(f"{model.base_model_prefix}.{LayershareConfig(groups).guard}") == [0]
    assert sum(torch.Size(shape).numel() for shape in names.values()) == model.num_parameters()

    loaded.dequantize().save_pretrained(tmp_path / "dense")
    assert "layershare" not in (tmp_path / "dense" / "config.json").read_text()
    original = tiny_model(family)
    original.save_pretrained(tmp_path / "original")
    assert stored(tmp_path / "dense") == stored(tmp_path / "original")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not any(isinstance(module, ComposedLinear) for module in dense.modules())
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-5)


def test_shards_with_one_group_in_several(llama, tmp_path):
    # transformers orders the tensors of a loaded model otherwise than those of a live one.
    model: Any = AutoModelForCausalLM.from_pretrained(llama[1])
    model.save_pretrained(tmp_path / "first", max_shard_size="15KB")
    shards = json.loads((tmp_path / "first" / "model.safetensors.index.json").read_text())["weight_map"]
    for group in model.hf_quantizer.groups:
        assert len({shards[f"model.{name}.coef.weight"] for name in group.members}) > 1
    for anchored in model.hf_quantizer.edits.deltas:
        assert len({shards[f"model.{name}.up.weight"] for name in anchored.members}) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert torch.equal(logits(model), logits(loaded))
    loaded.save_pretrained(tmp_path / "second", max_shard_size="15KB")
    for name in set(shards.values()):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_dtypes(llama):
    _, folder = llama
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in loaded.half().parameters()} == {torch.float16}
    assert {parameter.dtype for parameter in loaded.float().parameters()} == {torch.float32}
    assert logits(loaded).isfinite().all()
    # `config.dtype` still says bfloat16, which must not come back with the dense layers.
    assert {parameter.dtype for parameter in loaded.dequantize().parameters()} == {torch.float32}
    again = AutoModelForCausalLM.from_pretrained(folder).dequantize(torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_other_heads_from_the_same_checkpoint(family, tmp_path):
    model = compressed(family)
    model.save_pretrained(tmp_path / "lm")
    ids = tokens()
    with torch.no_grad():
        expected = model.base_model(ids).last_hidden_state
    base, info = reported(AutoModel, tmp_path / "lm")
    assert not info["missing_keys"]
    classifier, info = reported(AutoModelForSequenceClassification, tmp_path / "lm", num_labels=3)
    assert info["missing_keys"] == {"score.weight"}
    base.save_pretrained(tmp_path / "base")
    assert stored(tmp_path / "base")[model.hf_quantizer.edits.guard] == [0]
    again = AutoModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for other in (base, classifier.base_model, again):
            assert torch.equal(other(ids).last_hidden_state, expected)


@pytest.mark.parametrize("on_disk", [(0, 1), (2, 3)], ids=["owners on disk", "members on disk"])
def test_group_split_over_cpu_and_disk(llama, tmp_path, on_disk):
    model, folder = llama
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{layer}": "disk" if layer in on_disk else "cpu" for layer in range(4)}
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "off")
    assert torch.equal(logits(model), logits(loaded))
    with pytest.raises(LayershareError, match="offloaded"):
        loaded.dequantize()
    with pytest.warns(UserWarning, match="offloaded modules"):
        loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_copies_and_strict_state_dict(llama):
    model, _ = llama
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        for parameter in twin.parameters():
            parameter.data.zero_()
        twin.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)


def test_a_trip_over_meta_keeps_the_sharing(llama):
    """The route of accelerate's memory-saving FSDP start."""
    model, _ = llama
    twin = copy.deepcopy(model).to("meta")
    twin.tie_weights()
    twin.to_empty(device="cpu")
    twin.load_state_dict(model.state_dict(), strict=True)
    twin.model.rotary_emb = model.model.rotary_emb  # buffers that no state dict holds
    assert torch.equal(logits(twin), logits(model))


def test_the_live_model_looks_loaded(llama):
    model, folder = llama
    loaded, _ = reported(AutoModelForCausalLM, folder)
    assert model.config.quantization_config.to_dict() == loaded.config.quantization_config.to_dict()
    assert loaded.config.quantization_config.compression == {"method": "random", "keep": 0.5}
    for each in (model, loaded):
        assert each.is_quantized is False
        assert each.hf_quantizer.is_trainable
        assert type(each._no_split_modules) is type(tiny_model("llama")._no_split_modules)
        assert {SharedBasis.__name__, SharedDense.__name__} <= each._no_split_modules & each.model._no_split_modules
        assert each._fsdp_plan["model.layers.*.mlp.gate_proj.basis"] == "free_full_weight"
        assert each._fsdp_plan["model.layers.*.self_attn.v_proj.base"] == "free_full_weight"
        assert each._tp_plan["model.layers.*.mlp.gate_proj"] == "layershare_colwise"
        assert each._tp_plan["model.layers.*.mlp.down_proj"] == "layershare_rowwise"
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["version"] == FORMAT_VERSION


def test_other_fields_of_the_config_survive():
    ours = LayershareConfig([Group("q", "input", 2, ("a",))], deltas=[Anchored("k", 2, "b", ("c",))])
    content = {**ours.to_dict(), "added_by": "another tool"}
    again: Any = LayershareConfig.from_dict(json.loads(json.dumps(content)))
    assert again.to_dict() == content


def test_swap_on_a_real_model_keeps_biases_and_places():
    model = tiny_model("qwen2", dtype=torch.bfloat16).train()
    bias = model.get_submodule("model.layers.1.self_attn.q_proj").bias
    swap_modules(model, some_groups(model))
    layer = model.get_submodule("model.layers.1.self_attn.q_proj")
    assert isinstance(layer, FactorLinear)
    assert layer.bias is bias
    assert layer.training
    assert layer.coef.weight.dtype == torch.bfloat16


def test_dense_model_cannot_be_quantized_on_load(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LayershareConfig())


def test_load_and_save(llama, tmp_path):
    model, folder = llama
    save(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_layershare.LlamaForCausalLM"}
    loaded = load(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    # A re-save by transformers alone does not copy the shim, so it must not be promised either.
    loaded.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    dense = load(folder, dense=True, dtype=torch.float64)
    assert not any(isinstance(module, ComposedLinear) for module in dense.modules())
    torch.testing.assert_close(logits(dense), logits(load(folder, dtype=torch.float64)))
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(load(tmp_path / "dense", dense=True)), logits(dense))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"members": ["layers.0.self_attn.qproj"]}, "Did you mean 'layers.0.self_attn.q_proj'"),
        ({"members": ["layers.9.self_attn.q_proj"]}, "Unknown linear layer 'layers.9"),
        ({"members": ["layers.0.mlp"]}, "Unknown linear layer 'layers.0.mlp'"),
        ({"members": []}, "no member layers"),
        ({"members": ["layers.0.mlp.up_proj"] * 2}, "listed twice"),
        ({"members": ["layers.0.mlp.up_proj", "layers.1.mlp.down_proj"]}, "cannot share"),
        ({"rank": 0}, "whole number from 1 up"),
        ({"rank": "6"}, "whole number from 1 up"),
        ({"rank": 33}, "rank 33: its matrices allow 32 at most"),
        ({"side": "left"}, "Unknown side 'left'"),
        ({"ranks": 3}, "unexpected keyword argument"),
    ],
)
def test_malformed_groups(llama, tmp_path, group, message):
    def spoil(config):
        config["groups"] = [
            {"role": "q", "side": "input", "rank": 6, "members": ["layers.0.self_attn.q_proj"], **group}
        ]

    with pytest.raises(LayershareError, match=message):
        AutoModelForCausalLM.from_pretrained(edited(llama[1], tmp_path / "model", spoil))


@pytest.mark.parametrize(
    ("anchored", "message"),
    [
        ({"anchor": "layers.9.mlp.up_proj"}, "Unknown linear layer 'layers.9.mlp.up_proj'"),
        ({"anchor": "layers.0.self_attn.k_proj"}, "differ in shape: they cannot share"),
        ({"members": []}, "lists no anchor or no members"),
        ({"anchor": 0}, "lists no anchor or no members"),
        ({"members": ["layers.1.mlp.up_proj", "layers.1.mlp.up_proj"]}, "listed twice"),
        ({"members": ["layers.0.self_attn.q_proj"]}, "listed twice"),
        ({"rank": 0}, "whole number from 1 up"),
        ({"rank": 33}, "rank 33: its matrices allow 32 at most"),
        ({"side": "input"}, "unexpected keyword argument"),
    ],
)
def test_malformed_deltas(llama, tmp_path, anchored, message):
    def spoil(config):
        config["groups"] = [{"role": "q", "side": "input", "rank": 6, "members": ["layers.0.self_attn.q_proj"]}]
        config["deltas"] = [
            {"role": "up", "rank": 6, "anchor": "layers.0.mlp.up_proj", "members": ["layers.1.mlp.up_proj"], **anchored}
        ]

    with pytest.raises(LayershareError, match=message):
        AutoModelForCausalLM.from_pretrained(edited(llama[1], tmp_path / "model", spoil))


def test_swap_leaves_the_model_alone_when_it_refuses():
    model = tiny_model("llama")
    expected = logits(model)
    good = Group("q", "input", 4, ("layers.0.self_attn.q_proj",))
    with pytest.raises(LayershareError):
        swap_modules(model, [good, Group("q", "input", 40, ("layers.1.self_attn.q_proj",))])
    assert torch.equal(logits(model), expected)
    adopt(model, LayershareConfig([good]))
    with pytest.raises(LayershareError, match="compressed already"):
        swap_modules(model, [good])


def test_newer_format_is_refused(llama, tmp_path):
    folder = edited(llama[1], tmp_path / "model", lambda config: config.update(version=FORMAT_VERSION + 1))
    with pytest.raises(LayershareError, match=r"format version 2.*update it \(`pip install \.`"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "key",
    [
        "layers.1.self_attn.q_proj.bias",
        "layers.2.mlp.down_proj.coef.weight",
        "layers.0.self_attn.k_proj.basis.weight",
        "layers.0.self_attn.v_proj.base.weight",
        "layers.3.self_attn.v_proj.up.weight",
    ],
)
def test_missing_tensors_are_named(tmp_path, key):
    compressed("qwen2").save_pretrained(tmp_path / "whole")
    folder = edited(tmp_path / "whole", tmp_path / "cut", tensors=lambda state: state.pop(f"model.{key}"))
    on_disk = {"device_map": {"": "cpu", "model.layers.2": "disk"}, "offload_folder": tmp_path / "offload"}
    for auto_class, options in ((AutoModelForCausalLM, {}), (AutoModel, {}), (AutoModelForCausalLM, on_disk)):
        with pytest.raises(LayershareError, match=rf"lacks the tensor '{key}'"):
            auto_class.from_pretrained(folder, **options)


def test_weights_of_another_rank(llama, tmp_path):
    folder = edited(llama[1], tmp_path / "rank", lambda config: config["groups"][0].update(rank=5))
    with pytest.raises(LayershareError, match=r"\[32, 6\] in the checkpoint, but config\.json makes it \[32, 5\]"):
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_load_explains_what_it_cannot_read(llama, tmp_path):
    _, folder = llama
    (tmp_path / "empty").mkdir()
    with pytest.raises(LayershareError, match=r"no config\.json"):
        load(tmp_path / "empty")
    with pytest.raises(LayershareError, match="There is no model folder"):
        load(tmp_path / "nowhere")
    cut = edited(folder, tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LayershareError, match=r"The weight file 'model.safetensors' .* cannot be used"):
        load(cut)


@pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")
@pytest.mark.parametrize("method", [None, "shortgpt", "mlp-drop"])
def test_no_weight_of_any_model_is_made_up(method, tmp_path, tokenizer, words):
    model = tiny_model("llama")
    if method is not None:
        model = layershare.compress(model, tokenizer, method=method, text=words, blocks=24, length=32)
    model.save_pretrained(tmp_path / "whole")
    folder = edited(tmp_path / "whole", tmp_path / "part", tensors=lambda state: state.pop("model.norm.weight"))
    with pytest.raises(LayershareError, match=r"lacks 1 of its model's weights, among them 'model\.norm\.weight'"):
        load(folder)
