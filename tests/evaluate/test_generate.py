import json
import math

import pytest
import torch

from layershare.calibrate.text import load_text
from layershare.errors import LayershareError
from layershare.evaluate.generate import PROMPT_TOKENS, SAMPLE_TOKENS, compare_samples, continue_text
from tests.families import tiny_model

ODD = {"num_beams": 2, "num_return_sequences": 2, "return_dict_in_generate": True, "repetition_penalty": 3.0}


@torch.no_grad()
def test_samples_continue_test_blocks_with_the_likeliest_token(tokenizer, words):
    text = load_text(words, tokenizer, split="test", blocks=9, length=80)
    model, original = tiny_model("llama"), tiny_model("llama", seed=3)
    samples = compare_samples(model, original, text, tokenizer)
    assert [sample["prompt"] for sample in samples] == [
        tokenizer.decode(text.tokens[row, :PROMPT_TOKENS]) for row in (0, 4, 8)
    ]
    for each, key in ((model, "model"), (original, "original")):
        tokens = text.tokens[4:5, :PROMPT_TOKENS]
        while tokens.shape[1] < PROMPT_TOKENS + SAMPLE_TOKENS and int(tokens[0, -1]) != tokenizer.eos_token_id:
            tokens = torch.cat([tokens, each(tokens).logits[:, -1:].argmax(-1)], dim=1)
        assert samples[1][key] == tokenizer.decode(tokens[0, PROMPT_TOKENS:], skip_special_tokens=True)
    assert any(sample["model"] != sample["original"] for sample in samples)


def test_settings_of_generation_do_not_change_what_samples_are(tokenizer, words):
    text = load_text(words, tokenizer, split="test", blocks=9, length=80)
    model, other = tiny_model("llama"), tiny_model("llama")
    for name, value in ODD.items():
        setattr(other.generation_config, name, value)
    for sample in compare_samples(model, other, text, tokenizer):
        assert sample["model"] == sample["original"]
    assert other.generation_config.num_beams == ODD["num_beams"]


def test_a_text_comes_out_whatever_the_settings_of_generation(tokenizer, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain = continue_text(tmp_path, "a b", tokens=4)
    (tmp_path / "generation_config.json").write_text(json.dumps({**ODD, "repetition_penalty": 1.0}))
    assert continue_text(tmp_path, "a b", tokens=4) == plain


def test_short_blocks_give_short_samples(tokenizer, words):
    text = load_text(words, tokenizer, split="test", blocks=2, length=6)
    samples = compare_samples(tiny_model("llama"), tiny_model("llama"), text, tokenizer)
    assert [len(sample["prompt"]) for sample in samples] == [3, 3]
    assert all(len(sample["model"]) <= 3 and sample["model"] == sample["original"] for sample in samples)


def test_what_cannot_be_generated_is_refused(tokenizer, tmp_path):
    for temperature in (1e-320, 1e-3, 1e9, math.inf, math.nan, -1.0):
        with pytest.raises(LayershareError, match=r"cannot be sampled at; give 0, or 0\.01 to 1000"):
            continue_text("sample", "a", temperature=temperature)
    tiny_model("bloom").save_pretrained(tmp_path)  # without a limit of its own
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(LayershareError, match=r"1 \+ 1000000000 tokens do not fit"):
        continue_text(tmp_path, "a", tokens=10**9)
    (tmp_path / "generation_config.json").write_text('{"bad_words_ids": 5}')
    with pytest.raises(LayershareError, match=r"generation_config\.json cannot be used .*repair or delete"):
        continue_text(tmp_path, "a", tokens=2)
