import math

import pytest
import torch

import layershare
from layershare.calibrate.text import load_text
from layershare.errors import LayershareError
from layershare.evaluate.divergence import evaluate
from tests.families import tiny_model


@pytest.fixture
def text(tokenizer, words):
    return load_text(words, tokenizer, split="test", blocks=7, length=24)


@torch.no_grad()
def test_measures_by_brute_force(text):
    model, original = tiny_model("llama"), tiny_model("llama", seed=3)
    nll, kl, agree, count = 0.0, 0.0, 0, 0
    for block in text.tokens:
        ours = model(block[None]).logits[0].double().softmax(-1)
        theirs = original(block[None]).logits[0].double().softmax(-1)
        for i in range(len(block) - 1):
            nll -= math.log(float(ours[i, block[i + 1]]))
            kl += float((theirs[i] * (theirs[i] / ours[i]).log()).sum())
            agree += int(ours[i].argmax() == theirs[i].argmax())
            count += 1
    measured = evaluate(model, text, original, batch_size=3)
    assert measured.perplexity.tokens == count == 7 * 23
    assert measured.perplexity.value == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert measured.kl == pytest.approx(kl / count, rel=1e-4)
    assert measured.top1_agreement == pytest.approx(agree / count)
    assert measured.original_perplexity == evaluate(original, text, batch_size=3).perplexity


def test_a_model_agrees_with_itself_and_keeps_its_mode(text):
    model = tiny_model("gpt2").train()
    measured = evaluate(model, text, model)
    assert measured.kl == 0
    assert measured.top1_agreement == 1
    assert model.training
    assert measured.text == text.identity


def test_models_of_different_vocabularies_cannot_be_compared(text):
    model, other = tiny_model("llama"), tiny_model("llama")
    other.resize_token_embeddings(170, mean_resizing=False)
    with pytest.raises(LayershareError, match="different vocabularies"):
        evaluate(model, text, other)


def test_the_python_interface_measures_on_the_held_out_part(tokenizer):
    model = tiny_model("llama")
    measured = layershare.measure(model, tokenizer, text="stdlib", blocks=2, length=16, original=model)
    assert measured.text["source"] == "stdlib"
    assert measured.perplexity.tokens == 30


def test_an_evaluation_is_printed_for_people(text):
    model = tiny_model("llama")
    alone, beside = evaluate(model, text), evaluate(model, text, model)
    number = f"{alone.perplexity.value:.4g}"
    assert str(alone) == f"perplexity {number} on 7 blocks of 24 tokens of strings, float32"
    assert str(beside).splitlines() == [
        f"perplexity {number} (original: {number}) on 7 blocks of 24 tokens of strings, float32",
        "KL divergence from the original: 0 nats per token",
        "top-1 agreement with the original: 100.0%",
    ]
    assert repr(alone).startswith("Evaluation(text={")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, "'blocks' in the recipe"),
        ({"blocks": -1}, "'blocks' in the recipe"),
        ({"length": 1}, "'length' in the recipe"),
        ({"length": 129}, "Blocks of 129 tokens do not fit: this model takes 2 to 128"),
        ({"batch_size": 0}, "'batch_size' in the recipe"),
        ({"text": ["short"]}, "less than one block of 128; give a longer text or a smaller length"),
        ({"text": []}, "is empty"),
        ({"text": ""}, "has no name"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_in_python(options, message, tokenizer):
    with pytest.raises(LayershareError, match=message):
        layershare.measure(tiny_model("llama"), tokenizer, **{"text": "stdlib", "blocks": 1, **options})


def test_tokens_that_the_model_does_not_know_are_refused(tokenizer, words):
    small = tiny_model("llama")
    small.resize_token_embeddings(80, mean_resizing=False)
    with pytest.raises(LayershareError, match=r"tokens up to number .*, the model knows 80; use the model's own"):
        layershare.measure(small, tokenizer, text=["a~" * 100], length=16)
    with pytest.raises(LayershareError, match=r"original has another vocabulary \(160 tokens, this model 80\)"):
        layershare.measure(small, tokenizer, text=words, length=16, original=tiny_model("llama"))


def test_progress_is_shown_where_it_is_asked_for_or_in_a_terminal(tokenizer, words, capsys):
    for progress, shown in ((True, True), (False, False), (None, False)):
        layershare.measure(tiny_model("llama"), tokenizer, text=words, blocks=1, length=16, progress=progress)
        assert ("evaluate" in capsys.readouterr().err) == shown
