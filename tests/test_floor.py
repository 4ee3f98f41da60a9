"""What must work with the oldest transformers that pyproject.toml allows; `make floor` runs this with that one."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import layershare
from tests.families import tiny_model, tokens


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_small_model_is_saved_loaded_and_healed(family, tokenizer, words, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(words), encoding="utf-8")
    small = layershare.compress(tiny_model(family), tokenizer, method="svd", keep=0.8)
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        before = small.eval()(tokens()).logits
        torch.testing.assert_close(again.eval()(tokens()).logits, before)
    healed = layershare.heal(again, tokenizer, train="factors", loss="ce", text=text, length=16, tokens=256)
    with torch.no_grad():
        assert not torch.equal(healed.eval()(tokens()).logits, before)
    assert healed.num_parameters() == small.num_parameters()
