import os
import string
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.families import tiny_model

# Of every process that a test starts, too: threads that wait for each other take long beside other tests.
os.environ["OMP_NUM_THREADS"] = "1"
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token per printable character, numbered from 3, which fits the vocabulary of the tiny families."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {character: 3 + i for i, character in enumerate(string.printable[:96] + "\n")}
    characters = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def words() -> list[str]:
    """Some text: documents of random letters."""
    generator = torch.Generator().manual_seed(0)
    letters = string.ascii_lowercase + "     "
    draws = torch.randint(0, len(letters), (40, 200), generator=generator).tolist()
    return ["".join(letters[i] for i in draw) for draw in draws]


@pytest.fixture
def folder(tmp_path, tokenizer, words) -> Path:
    """A tiny model's folder with a tokenizer, and beside it a text."""
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n".join(words))
    return tmp_path / "dense"


def shared_model(name: str) -> Path:
    """A real small model of the team's, where it is there."""
    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not here")
    return folder
