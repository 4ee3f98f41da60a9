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
