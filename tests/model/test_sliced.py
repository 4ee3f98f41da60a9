"""Sliced models as Hugging Face models: saved, loaded, generating, trained, refused."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

import layershare
from layershare.errors import LayershareError
from layershare.model.hub import load
from layershare.model.sliced import SlicedNorm
from layershare.store import MANIFEST
from tests.families import tiny_model, tokens
from tests.model.small import logits

pytestmark = pytest.mark.filterwarnings(
    "ignore:The text has .* tokens, fewer", "ignore:`(is_)?gradient_checkpointing:FutureWarning"
)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request, tmp_path_factory, tokenizer, words) -> Path:
    """The folder of a sliced model; GPT-2's embedding was tied to its head and its norms have biases."""
    folder = tmp_path_factory.mktemp(request.param) / "small"
    model = tiny_model(request.param)
    options: dict[str, Any] = {"keep": 0.7, "blocks": 24, "length": 32}
    layershare.compress(model, tokenizer, method="slicegpt", text=words, folder=folder, **options)
    return folder


def test_saved_again_it_is_the_same_and_its_config_says_what_was_sliced(folder, tmp_path):
    model: Any = load(folder)
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "again"))
    assert first["quantization_config"] == second["quantization_config"]
    width = first["quantization_config"]["slice"]["width"]
    assert model.get_input_embeddings().weight.shape[1] == model.get_output_embeddings().weight.shape[1] == width < 32
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_the_base_model_alone_loads(folder):
    model: Any = load(folder)
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder)(tokens()).last_hidden_state
        assert torch.equal(model.get_output_embeddings()(states), logits(model))


def test_generation_with_any_cache_is_that_without(folder):
    model: Any = load(folder)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(tokens(), use_cache=False, **options)
    assert torch.equal(model.generate(tokens(), **options), plain)
    static = model.generate(tokens(), cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, plain)


def test_it_trains_with_and_without_gradient_checkpointing(folder):
    gradients = []
    for checkpointing in (False, True):
        model: Any = load(folder)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert sum(name.endswith("shortcut.weight") for name in gradients[0]) == 8
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("target", ["all-linear", ["down_proj", "c_proj"]])
def test_adapters_on_the_writers_start_as_nothing_and_train(folder, target):
    model: Any = load(folder)
    expected = logits(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=target))
    torch.testing.assert_close(logits(adapted.eval()), expected)
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("lora_B" in name for name in gradients)
    assert all(gradient is not None for gradient in gradients.values())
    assert not any("shortcut" in name for name in gradients)


def test_a_head_for_another_task_is_refused(folder):
    with pytest.raises(LayershareError, match=r"A sliced model cannot be a .*ForSequenceClassification"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_copy_is_independent_and_keeps_nothing_of_a_forward(folder):
    model = load(folder)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin), logits(load(folder)))
    assert all(norm._entered is None for norm in twin.modules() if isinstance(norm, SlicedNorm))


def test_there_is_no_dense_model(folder, tmp_path):
    for attempt in (lambda: load(folder, dense=True), lambda: load(folder).dequantize()):
        with pytest.raises(LayershareError, match="A sliced model has no dense equivalent"):
            attempt()
    with pytest.raises(LayershareError, match="A sliced model has no dense equivalent"):
        layershare.export(folder, tmp_path / "dense", to="dense")
    assert not (tmp_path / "dense").exists()


def test_half_a_checkpoint_or_another_config_is_refused(folder, tmp_path):
    broken = Path(shutil.copytree(folder, tmp_path / "broken", ignore=shutil.ignore_patterns(MANIFEST)))
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if name.endswith("shortcut.weight"))
    del tensors[name]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(LayershareError, match=r"lacks the tensor '.*shortcut.weight'"):
        load(broken)
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"width": 5}, "config.json and weights are of different models"),
        ({"stream": {}}, "The quantization_config of config.json cannot be used"),
        ({"more": 1}, "The quantization_config of config.json cannot be used"),
    ):
        changed = copy.deepcopy(config)
        changed["quantization_config"]["slice"] |= change
        (broken / "config.json").write_text(json.dumps(changed))
        with pytest.raises(LayershareError, match=message):
            load(broken)
    config["quantization_config"]["slice"]["stream"]["embeddings"] = ["elsewhere"]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(LayershareError, match="has no 'elsewhere'"):
        load(broken)


def test_tensor_parallelism_does_not_split_it(folder):
    model: Any = load(folder)
    assert model.tp_plan == {}
