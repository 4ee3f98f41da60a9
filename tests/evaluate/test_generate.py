import torch

from layershare.calibrate.text import load_text
from layershare.evaluate.generate import PROMPT_TOKENS, SAMPLE_TOKENS, compare_samples
from tests.families import tiny_model


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


def test_short_blocks_give_short_samples(tokenizer, words):
    text = load_text(words, tokenizer, split="test", blocks=2, length=6)
    samples = compare_samples(tiny_model("llama"), tiny_model("llama"), text, tokenizer)
    assert [len(sample["prompt"]) for sample in samples] == [3, 3]
    assert all(len(sample["model"]) <= 3 and sample["model"] == sample["original"] for sample in samples)
