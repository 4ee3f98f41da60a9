import json
import re
from pathlib import Path

import layershare
from layershare.model.hub import load
from layershare.model.source import read_config, read_tokenizer, resolve

FOLDER = Path(resolve("sample"))


def test_the_sample_model_is_small_and_says_what_it_is():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 16e6
    spec = layershare.describe(read_config("sample"))
    assert 8 <= spec.n_layers <= 12
    assert 5e6 < spec.parameters < 10e6
    assert {dtype for _, dtype in spec.tensors.values()} == {load(FOLDER).dtype}
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"{spec.parameters:,} parameters" in card


def test_the_sample_model_has_learned_from_its_text():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"Held-out perplexity ([\d.]+)", card)
    assert stated is not None
    tokenizer = read_tokenizer("sample")
    measured = layershare.measure(load(FOLDER), tokenizer, text="stdlib", blocks=8, length=256)
    # Fewer tokens, shorter context and perhaps another Python's library than in the card.
    assert measured.perplexity.value < 3 * float(stated[1])
    assert json.loads((FOLDER / "training.json").read_text())


def test_the_tokenizer_gives_code_back_as_it_was():
    tokenizer = read_tokenizer("sample")
    code = "class A:\n\tdef f(self):\n        return {'ü': 1.5}  # done\r\n\n"
    assert tokenizer.decode(tokenizer(code)["input_ids"]) == code
