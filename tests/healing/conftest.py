from pathlib import Path

import pytest

from tests.healing.tiny import compress_tiny


@pytest.fixture(scope="session")
def small(tmp_path_factory, tokenizer, words) -> Path:
    """A compressed tiny model's folder, with its original in `dense` and a text in `text.txt` beside it."""
    return compress_tiny(tmp_path_factory.mktemp("heal"), tokenizer, words)


@pytest.fixture(scope="session")
def shared(tmp_path_factory, tokenizer, words) -> Path:
    """A model whose layers 1 and 2 use weights of layer 0 and deltas."""
    folder = tmp_path_factory.mktemp("deltas")
    options = {"protect": 0, "layout": "sequential"}
    return compress_tiny(folder, tokenizer, words, method="delta", keep=0.9, options=options)
