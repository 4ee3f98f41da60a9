"""Which type is computed in: halves where the machine is fast at them."""

import pytest
import torch
from transformers import LlamaConfig

from layershare import device
from layershare.device import dtype_of, precision_of, training_device
from layershare.errors import LayershareError
from layershare.recipe import make_recipe
from layershare.run import run
from tests.families import tiny_model


@pytest.mark.parametrize(
    ("fast", "wanted", "place", "own", "computed"),
    [
        (False, "auto", "cpu", "bfloat16", "float32"),
        (False, "auto", "cpu", "float64", "auto"),
        (False, "bfloat16", "cpu", "bfloat16", "bfloat16"),
        (False, "auto", "cuda:1", "bfloat16", "auto"),
        (True, "auto", "cpu", "bfloat16", "auto"),
    ],
)
def test_halves_are_widened_where_they_are_slow(monkeypatch, fast, wanted, place, own, computed):
    monkeypatch.setattr(device, "multiplies_halves", lambda: fast)
    assert dtype_of(wanted, place, LlamaConfig(dtype=own)) == computed
    expected = "float32" if place == "cpu" and not fast else "bfloat16"
    assert precision_of("auto", place) == expected
    assert (precision_of("float32", place), precision_of("bfloat16", place)) == ("float32", "bfloat16")


def test_another_device_than_the_first_is_not_trained_on(monkeypatch):
    monkeypatch.setattr(device, "device_of", lambda name: name)
    assert [training_device(each) for each in ("cpu", "cuda", "cuda:0")] == ["cpu", "cuda", "cuda:0"]
    with pytest.raises(LayershareError, match=r"not on 'cuda:1': set device=cuda, .*CUDA_VISIBLE_DEVICES=1"):
        training_device("cuda:1")


@pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")
def test_what_is_stored_does_not_depend_on_it(monkeypatch, tmp_path, tokenizer, words):
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n".join(words))
    calibration = {"text": str(tmp_path / "text.txt"), "blocks": 8, "length": 32}
    evaluation = {"text": str(tmp_path / "text.txt"), "blocks": 2, "length": 32}
    recipe = make_recipe(
        {
            "model": str(tmp_path / "dense"),
            "method": "svd-llm",
            "device": "cpu",
            "calibration": calibration,
            "evaluation": evaluation,
        }
    )
    for fast in (True, False):
        monkeypatch.setattr(device, "multiplies_halves", lambda fast=fast: fast)
        with pytest.warns(UserWarning, match="very text"):
            results = run(recipe, tmp_path / str(fast), pages=False)
        assert results.evaluation is not None
        assert results.evaluation.dtype == ("bfloat16" if fast else "float32")
        assert '"dtype": "bfloat16"' in (tmp_path / str(fast) / "config.json").read_text()
    sizes = [(tmp_path / each / "model.safetensors").stat().st_size for each in ("True", "False")]
    assert sizes[0] == sizes[1]
