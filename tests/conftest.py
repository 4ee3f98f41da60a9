import os
import shutil
import socket
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from layershare.cli import main
from tests import warm
from tests.families import tiny_model

# Of every process that a test starts, too: threads that wait for each other take long beside other tests.
os.environ["OMP_NUM_THREADS"] = "1"
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 4 << 30:
    # Where pytest makes temporary folders. On a disk, runs wait for every file until it is written.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
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


@pytest.fixture(scope="session")
def commands(tmp_path_factory) -> Iterator[Path]:
    """A folder with `python` and `layershare`, whose processes start without waiting for imports of other packages."""
    folder = tmp_path_factory.mktemp("bin")
    warm.write_commands(folder, str(folder / "server"))
    if sys.platform != "linux":
        yield folder
        return
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "server"))
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, warm.__file__, "--serve", str(folder / "python"), str(listener.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
        )
    with server:
        yield folder
        server.terminate()


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


@pytest.fixture
def run(monkeypatch, capfd):
    """Call the command line: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["layershare", *arguments])
        capfd.readouterr()  # what the test itself has printed
        with pytest.raises(SystemExit) as end:
            main()
        captured = capfd.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call
