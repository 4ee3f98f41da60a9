"""Models in memory that cannot be taken as they are: a sentence says what to give in their place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

import layershare
from layershare.errors import LayershareError
from layershare.model.weights import Weights
from tests.families import CONFIGS, tiny_model, tokens

# transformers renames this method; PEFT knows the old name only.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")


def lora() -> LoraConfig:
    return LoraConfig(target_modules=["q_proj"])


def adapted() -> Any:
    model = tiny_model("llama")
    model.add_adapter(lora())
    return model


def block_compiled() -> Any:
    model: Any = tiny_model("llama")
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


def with_up_proj(layer: nn.Module) -> Any:
    model: Any = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = layer
    return model


def eight_bit() -> nn.Module:
    layer = nn.Linear(32, 56, bias=False)
    layer.weight = nn.Parameter(torch.ones(56, 32, dtype=torch.int8), requires_grad=False)
    return layer


class Packed(nn.Module):
    """A layer whose weight is no tensor, as torch's own quantized ones."""

    def get_extra_state(self) -> Any:
        return "packed"

    def set_extra_state(self, state: Any) -> None:
        raise NotImplementedError


class Spread(torch.Tensor):
    """A tensor that is not as it looks, as those of torchao and of FSDP."""


def spread() -> nn.Module:
    layer = nn.Linear(32, 56, bias=False)
    layer.weight = nn.Parameter(torch.ones(56, 32).as_subclass(Spread))
    return layer


def on_meta() -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIGS["llama"]())


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "a name": (lambda: "sample", "is a name, 'sample': load it"),
    "nothing": (lambda: None, "not a NoneType"),
    "a pipeline": (lambda: pipeline("text-generation", tiny_model("llama"), tokenizer=TOKENIZER[0]), "its `.model`"),
    "no head": (lambda: AutoModel.from_config(CONFIGS["llama"]()), "LlamaModel does not predict next tokens"),
    "another head": (
        lambda: AutoModelForSequenceClassification.from_config(CONFIGS["llama"]()),
        "LlamaForSequenceClassification does not predict",
    ),
    "another module": (lambda: nn.Linear(2, 2), "not a Linear"),
    "PEFT": (lambda: get_peft_model(tiny_model("llama"), lora()), "carries adapters"),
    "an adapter": (adapted, "carries adapters"),
    "compiled": (
        lambda: torch.compile(tiny_model("llama"), backend="eager"),
        r"wrapped \(OptimizedModule\).* `._orig_mod`",
    ),
    "a compiled block": (block_compiled, "Parts of the .* are compiled"),
    "parallel": (lambda: nn.DataParallel(tiny_model("llama")), r"wrapped \(DataParallel\).* `.module`"),
    "offloaded": (lambda: cpu_offload(tiny_model("llama")), "no weights in memory"),
    "on meta": (on_meta, "no weights in memory"),
    "int8": (lambda: with_up_proj(eight_bit()), r"up_proj.weight' of the .* is quantized \(int8\)"),
    "packed": (lambda: with_up_proj(Packed()), "up_proj._extra_state' of the .* is quantized"),
    "spread": (lambda: with_up_proj(spread()), "up_proj.weight' of the .* is a Spread"),
}
RUN = ("PEFT", "an adapter", "compiled", "a compiled block", "int8", "packed", "spread")
"""What may be measured all the same, if it runs."""
TOKENIZER: list[Any] = []


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_taken(kind, tokenizer, words, tmp_path):
    TOKENIZER[:] = [tokenizer]
    make, sentence = WRONG[kind]
    model, fine = make(), tiny_model("llama")
    calls: dict[str, Callable[[], Any]] = {
        "compress": lambda: layershare.compress(model, tokenizer, text=words),
        "heal": lambda: layershare.heal(model, tokenizer, teacher=fine, text=words),
        "save": lambda: layershare.save(model, tmp_path / "saved"),
        "describe": lambda: layershare.describe(model),
        "make_plan": lambda: layershare.make_plan(model),
        "teacher": lambda: layershare.heal(fine, tokenizer, teacher=model, text=words),
        "measure": lambda: layershare.measure(model, tokenizer, text=words),
        "original": lambda: layershare.measure(fine, tokenizer, text=words, original=model),
    }
    if kind in ("a name", "nothing"):  # which a teacher may be
        del calls["teacher"], calls["original"]
    if kind in ("offloaded", "on meta"):  # of which no weights are needed
        del calls["describe"], calls["make_plan"]
    if kind in RUN:
        del calls["measure"], calls["original"]
    for call in calls.values():
        with pytest.raises(LayershareError, match=sentence):
            call()
    assert not (tmp_path / "saved").exists()


def test_modules_that_the_config_does_not_make(tokenizer, words):
    wrapped, narrow = nn.Sequential(nn.Linear(32, 56, bias=False)), nn.Linear(32, 48, bias=False)
    for layer, said in ((wrapped, "that its config makes"), (narrow, "changed after loading")):
        with pytest.raises(LayershareError, match=said):
            layershare.compress(with_up_proj(layer), tokenizer, text=words)
    model: Any = tiny_model("llama")
    del model.model.layers[3]
    with pytest.raises(LayershareError, match=r"it lacks 'model.layers.3.*give that model"):
        layershare.describe(model)


def test_adapted_and_compiled_models_are_measured(tokenizer, words):
    model = tiny_model("llama")
    every: list[Any] = [get_peft_model(tiny_model("llama"), lora()), torch.compile(model, backend="eager")]
    for wrapped in every:
        options = {"text": words, "blocks": 1, "length": 16, "original": model}
        assert layershare.measure(wrapped, tokenizer, **options).kl == pytest.approx(0, abs=1e-6)


def test_a_model_that_is_being_trained(tokenizer, words):
    """GPT-2 has dropout."""
    results = []
    for training in (True, False):
        model = tiny_model("gpt2").train(training)
        if training:
            model(input_ids=tokens(), labels=tokens()).loss.backward()
        small = layershare.compress(
            model, tokenizer, method="svd-llm", keep=0.6, of="targets", text=words, blocks=8, length=32
        )
        assert model.training == small.training == training
        results.append(small.eval()(tokens()).logits)
    assert torch.equal(*results)


def test_a_head_untied_by_hand(tmp_path):
    model: Any = tiny_model("gemma")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 0.1)
    with pytest.raises(LayershareError, match="in memory they are two different tensors"):
        Weights.of(model).require_sound()
    model.config.tie_word_embeddings = False  # as the sentence says
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    Weights.of(again).require_sound()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
