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
from layershare.model.composition import Member, deltas, shared
from layershare.model.hub import (
    FORMAT_VERSION,
    LayershareConfig,
    load,
    save,
)
from layershare.model.layers import ComposedLinear, SharedLinear
from layershare.model.swap import swap_modules
from tests.families import CONFIGS, tiny_model, tokens
from tests.model.small import adopt, compressed, logits, some_shares


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
    compositions = model.hf_quantizer.edits.compositions
    groups, deltas = ([each for each in compositions if each.whole == whole] for whole in (False, True))
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
    assert sum(name.endswith(".base.weight") for name in names) == len(deltas) > 0
    for part in ("down", "up"):
        count = sum(len(each.terms[1].members) for each in deltas)
        assert sum(name.endswith(f".{part}.weight") for name in names) == count
    assert names.pop(f"{model.base_model_prefix}.{LayershareConfig(compositions).guard}") == [0]
    numbers = {name: torch.Size(shape).numel() for name, shape in names.items() if not name.endswith("_order")}
    assert sum(numbers.values()) == model.num_parameters()

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
    for composition in model.hf_quantizer.edits.compositions:
        own = composition.terms[-1].members or composition.names
        part = "up" if composition.whole else "coef"
        assert len({shards[f"model.{name}.{part}.weight"] for name in own}) > 1
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
        assert SharedLinear.__name__ in each._no_split_modules & each.model._no_split_modules
        assert each._fsdp_plan["model.layers.*.mlp.gate_proj.basis"] == "free_full_weight"
        assert each._fsdp_plan["model.layers.*.self_attn.v_proj.base"] == "free_full_weight"
        assert each._tp_plan["model.layers.*.mlp.gate_proj"] == "layershare_colwise"
        assert each._tp_plan["model.layers.*.mlp.down_proj"] == "layershare_rowwise"
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["version"] == FORMAT_VERSION


def test_other_fields_of_the_config_survive():
    members = [Member(name, 4, 4) for name in "abc"]
    ours = LayershareConfig([shared(members[:1], 2, "input"), deltas(members[1:], 2, ["c"])])
    content = {**ours.to_dict(), "added_by": "another tool"}
    again: Any = LayershareConfig.from_dict(json.loads(json.dumps(content)))
    assert again.to_dict() == content


def test_swap_on_a_real_model_keeps_biases_and_places():
    model = tiny_model("qwen2", dtype=torch.bfloat16).train()
    bias = model.get_submodule("model.layers.1.self_attn.q_proj").bias
    swap_modules(model, some_shares(model))
    layer = model.get_submodule("model.layers.1.self_attn.q_proj")
    assert isinstance(layer, ComposedLinear)
    assert layer.bias is bias
    assert layer.training
    assert {part.weight.dtype for part in layer.parts()} == {torch.bfloat16}


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


Q, UP = ("layers.{}.self_attn.q_proj", 32, 32), ("layers.{}.mlp.up_proj", 32, 56)


def entries(kind: tuple[str, int, int], *layers: Any) -> list[dict[str, Any]]:
    name, d_in, d_out = kind
    return [{"name": name.format(layer), "d_in": d_in, "d_out": d_out} for layer in layers]


def basis(**changes: Any) -> dict[str, Any]:
    """A shared basis of two layers, as it stands in the config, with changed entries of its first factor."""
    first = {"name": "basis", "outward": 6, "home": Q[0].format(0), **changes}
    return {"members": entries(Q, 0, 1), "terms": [{"factors": [first, {"name": "coef", "inward": first["outward"]}]}]}


def delta(base: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A delta, likewise, with changed entries of its low-rank term."""
    first = {"name": "base", "home": UP[0].format(0), **(base or {})}
    second = {"factors": [{"name": "down", "outward": 6}, {"name": "up", "inward": 6}], "members": [UP[0].format(1)]}
    return {"members": entries(UP, 0, 1), "terms": [{"factors": [first]}, {**second, **changes}]}


@pytest.mark.parametrize(
    ("composition", "message"),
    [
        ({**basis(home=Q[0].format(9)), "members": entries(Q, 9)}, r"Unknown linear layer 'layers\.9"),
        ({**basis(home="layers.0.mlp"), "members": entries(("layers.0.mlp", 32, 32), 0)}, "Unknown linear layer"),
        (
            {**basis(home="layers.0.self_attn.qproj"), "members": entries(("layers.0.self_attn.qproj", 32, 32), 0)},
            "Did",
        ),
        ({**basis(), "members": []}, "no member layers"),
        ({**basis(), "members": entries(Q, 0, 0)}, "listed twice"),
        ({**basis(), "members": entries(Q, 0, 2)}, "listed twice"),  # another one has layer 2
        (
            {**basis(), "members": [*entries(Q, 0), {"name": "layers.1.mlp.down_proj", "d_in": 56, "d_out": 32}]},
            "share",
        ),
        ({**basis(), "members": entries((Q[0], 32, 40), 0, 1)}, "is 32 × 32 in this model, but 32 × 40"),
        (basis(outward=0), "whole number from 1 up"),
        (basis(outward="6"), "whole number from 1 up"),
        (basis(outward=33), "rank 33: its matrices allow 32 at most"),
        (basis(inward=32), "do not make its matrices"),
        (basis(home=Q[0].format(1)), "elsewhere than in its first member"),
        (basis(side="left"), "unexpected keyword argument"),
        ({**basis(), "rank": 6}, "unexpected keyword argument"),
        ({"members": entries(Q, 0)}, "terms"),
        ({**delta(), "members": [*entries(UP, 0), *entries((UP[0], 32, 40), 1)]}, "width of 'base': they cannot share"),
        (delta(members=[UP[0].format(7)]), "do not make its matrices"),
        (delta(base={"home": UP[0].format(1)}), "elsewhere than in its first member"),
        (
            delta(factors=[{"name": "down", "outward": 33}, {"name": "up", "inward": 33}]),
            "rank 33: its matrices allow 32",
        ),
        (delta(factors=[{"name": "down", "outward": 3}, {"name": "up", "inward": 4}]), "do not make its matrices"),
    ],
)
def test_malformed_compositions(llama, tmp_path, composition, message):
    other = shared([Member(Q[0].format(2), 32, 32)], 6, "input").to_json()

    def spoil(config):
        config["compositions"] = [composition, other]

    with pytest.raises(LayershareError, match=message):
        AutoModelForCausalLM.from_pretrained(edited(llama[1], tmp_path / "model", spoil))


def test_swap_leaves_the_model_alone_when_it_refuses():
    model = tiny_model("llama")
    expected = logits(model)
    good = shared([Member("layers.0.self_attn.q_proj", 32, 32)], 4, "input")
    for other in (Member("layers.1.self_attn.q_proj", 32, 40), Member("layers.1.self_attn.q", 32, 32)):
        with pytest.raises(LayershareError):
            swap_modules(model, [good, shared([other], 4, "input")])
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
    def change(config):
        first, second = config["compositions"][0]["terms"][0]["factors"]
        first["outward"] = second["inward"] = 5

    folder = edited(llama[1], tmp_path / "rank", change)
    with pytest.raises(LayershareError, match=r"\[6, 26\] in the checkpoint, but config\.json makes it \[5, 27\]"):
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
