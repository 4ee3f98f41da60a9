"""Text by name, file or list, as token blocks of one length, hashed.

Calibration text (`split="train"`) is cut as Basis Sharing's code does it: every document is tokenized for itself, with
the special tokens that its tokenizer adds, all are concatenated and cut into blocks, of which `torch.randperm` with a
seed chooses some. Evaluation text (`split="test"`) is joined with empty lines, tokenized as one and cut into blocks
without overlap, in order. What does not fill a block is left out in both cases.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layershare.calibrate import stdlib
from layershare.errors import LayershareError, unknown

Split = Literal["train", "test"]
Source = str | Path | Sequence[str]

SEED = 2023
"""The seed of Basis Sharing's code."""


@dataclass(frozen=True)
class Text:
    """Token blocks (n × length, int64), where they come from, and the hashes of the text and of these very blocks.

    `bos`: whether the tokenizer put its beginning-of-sequence token before each text that it was given.
    """

    tokens: Tensor
    source: str
    text_sha256: str
    tokens_sha256: str
    bos: bool

    @property
    def identity(self) -> dict[str, Any]:
        """What tells one set of blocks from another, for manifests and results."""
        blocks, length = self.tokens.shape
        return {
            "source": self.source,
            "blocks": blocks,
            "length": length,
            "bos": self.bos,
            "text_sha256": self.text_sha256,
            "tokens_sha256": self.tokens_sha256,
        }

    def require_within(self, vocabulary: int) -> None:
        """Raise `LayershareError` if there is a token that a model of so many tokens does not know."""
        if (highest := int(self.tokens.max())) >= vocabulary:
            raise LayershareError(
                f"The tokenizer makes tokens up to number {highest}, the model knows {vocabulary}; use the model's own."
            )


def load_text(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: Split,
    blocks: int | None,
    length: int,
    seed: int = SEED,
) -> Text:
    """Load a text as at most `blocks` blocks (`None`: all) of `length` tokens.

    `source`: `wikitext2`, `c4`, `ptb`, `alpaca` (read through `datasets`), `stdlib` (the Python standard library's
    source on this machine), a `.txt`, `.jsonl` or `.parquet` file (field `text`), a folder of them, or strings.
    Raises `LayershareError` if the source is unknown or empty, or shorter than one block.
    """
    name, documents = read_documents(source, split)
    text_sha256 = hashlib.sha256("\0".join(documents).encode("utf-8", "replace")).hexdigest()
    if split == "test":
        documents = ["\n\n".join(documents)]
    # A few documents at a time: as Python integers, tokens take many times the memory that they take in a tensor.
    parts = [documents[start : start + 64] for start in range(0, len(documents), 64)]
    ids = torch.cat([_encode(tokenizer, part) for part in parts])
    count = len(ids) // length
    if count == 0:
        raise LayershareError(
            f"The text '{name}' has {len(ids)} tokens, less than one block of {length}; "
            "give a longer text or a smaller length."
        )
    order = torch.arange(count)
    if split == "train":
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    tokens = ids[: count * length].view(count, length)[order[:blocks]]
    return Text(
        tokens=tokens,
        source=name,
        text_sha256=text_sha256,
        tokens_sha256=hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        bos=tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id],
    )


def _encode(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> Tensor:
    encoded = tokenizer(documents, verbose=False, return_attention_mask=False)["input_ids"]
    return torch.tensor(list(chain.from_iterable(encoded)), dtype=torch.int64)


def read_documents(source: Source, split: Split) -> tuple[str, list[str]]:
    """A short name of the source and its documents. Raises `LayershareError` if there are none."""
    if not isinstance(source, str | Path):
        name, documents = "strings", list(source)
    elif str(source) in NAMED:
        name, documents = str(source), NAMED[str(source)](split)
    else:
        path = Path(source)
        if not path.exists():
            raise unknown("text", str(source), NAMED)
        files = sorted(file for file in path.rglob("*") if file.suffix in READERS) if path.is_dir() else [path]
        if not files:
            raise LayershareError(f"The folder '{path}' has no {', '.join(READERS)} file.")
        name, documents = path.name, list(chain.from_iterable(_read_file(file) for file in files))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise LayershareError(f"The text '{name}' is empty.")
    return name, documents


def _read_file(path: Path) -> Iterator[str]:
    if path.suffix not in READERS:
        raise LayershareError(f"'{path.name}' is not a text that can be read; give {', '.join(READERS)} or a folder.")
    return READERS[path.suffix](path)


def _read_txt(path: Path) -> Iterator[str]:
    yield path.read_text(encoding="utf-8", errors="replace")


def json_lines(path: Path) -> Iterator[Any]:
    """The values in a JSONL file, line by line. Raises `LayershareError` for a line that is not JSON."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise LayershareError(f"Line {number} of '{path.name}' is not JSON.") from error
            yield value


def _read_jsonl(path: Path) -> Iterator[str]:
    for row in json_lines(path):
        yield _field(row, "text", path.name)


def _read_parquet(path: Path) -> Iterator[str]:
    from datasets import Dataset

    try:
        rows = Dataset.from_parquet(str(path), keep_in_memory=True)
    except (OSError, ValueError) as error:
        raise LayershareError(f"'{path.name}' is not a Parquet file that can be read; write it again.") from error
    for row in rows:
        yield _field(row, "text", path.name)


def _field(row: Any, field: str, source: str) -> str:
    """The text of a row. Raises `LayershareError` if it has none."""
    if not isinstance(row, dict) or field not in row:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise LayershareError(f"'{source}' has no field '{field}' (found: {found}); rename the text's field to it.")
    if not isinstance(row[field], str):
        raise LayershareError(f"'{source}' has a row whose '{field}' is no text ({row[field]!r:.40}); leave it out.")
    return row[field]


def _hub(split: Split, *, path: str, splits: dict[Split, str], field: str = "text", **options: Any) -> list[str]:
    from datasets import load_dataset

    if split not in splits:
        raise LayershareError(f"'{path}' has no held-out part; evaluate on another text, such as wikitext2.")
    files = options.pop("files", None)
    if files:
        options["data_files"] = {splits[split].partition("[")[0]: files[split]}
    try:
        rows = load_dataset(path, split=splits[split], **options)
    except (OSError, ValueError) as error:
        raise LayershareError(
            f"The data set '{path}' could not be loaded ({type(error).__name__}); "
            "check the connection, or give a local file."
        ) from error
    return [_field(row, field, path) for row in rows]


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
NAMED: dict[str, Callable[[Split], list[str]]] = {
    "wikitext2": partial(
        _hub, path="Salesforce/wikitext", name="wikitext-2-raw-v1", splits={"train": "train", "test": "test"}
    ),
    "c4": partial(
        _hub,
        path="allenai/c4",
        files={"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"},
        splits={"train": "train[:20000]", "test": "validation[:1100]"},
    ),
    "ptb": partial(
        _hub,
        path="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        field="sentence",
        splits={"train": "train", "test": "test"},
    ),
    "alpaca": partial(_hub, path="tatsu-lab/alpaca", splits={"train": "train"}),
    "stdlib": stdlib.documents,
}
