from pathlib import Path

import pytest

from tests.healing.tiny import compress_tiny


@pytest.fixture(scope="session")
def small(tmp_path_factory, tokenizer, words) -> Path:
    """A compressed tiny model's folder, with its original in `dense` and a text in `text.txt` beside it."""
    return compress_tiny(tmp_path_factory.mktemp("heal"), tokenizer, words)
