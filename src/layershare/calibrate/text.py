"""Text by name, file or list, as token blocks of one length, hashed.

Calibration text (`split="train"`) is cut as Basis Sharing's code does it: every document is tokenized for itself, with
the special tokens that its tokenizer adds, all are concatenated and cut into blocks, of which `torch.randperm` with a
seed chooses some. Evaluation text (`split="test"`) is joined with empty lines, tokenized as one and cut into blocks
without overlap, in order. What does not fill a block is left out in both cases.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from layershare.calibrate import stdlib
from layershare.calibrate.files import Chat, adds_bos, document_of, read_files, text_of, writer_of
from layershare.connection import asking_hub
from layershare.errors import LayershareError, unknown
from layershare.foreign import reading
from layershare.values import Flag, Whole, Word

Split = Literal["train", "test"]
Source = str | Path | Sequence[str]

SEED = 2023
"""The seed of Basis Sharing's code."""

LENGTH = 2048
"""Tokens per block where the model's context allows it, in calibration and evaluation alike, as in the papers."""


def block_length(config: PreTrainedConfig, length: int | None) -> int:
    """Tokens per block: as asked, or 2048, or the model's whole context if that is shorter.

    Raises `LayershareError` if more is asked for than the context holds.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)  # models with ALiBi have no limit
    if length is None:
        return min(LENGTH, context or LENGTH)
    if length < 2 or length > (context or length):
        raise LayershareError(f"Blocks of {length} tokens do not fit: this model takes 2 to {context or 'any number'}.")
    return length


@dataclass(frozen=True)
class Blocks:
    """What is noted of a text: where it comes from, how many blocks of how many tokens it has, and its hashes."""

    source: Word
    blocks: Whole
    length: Whole
    bos: Flag
    text_sha256: Word
    tokens_sha256: Word


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
        """What tells one set of blocks from another, for manifests and results: the fields of `Blocks`."""
        blocks, length = self.tokens.shape
        return asdict(Blocks(self.source, blocks, length, self.bos, self.text_sha256, self.tokens_sha256))

    def split(self, count: int) -> tuple["Text", "Text"]:
        """The first `count` blocks, and the others."""

        def part(tokens: Tensor) -> Text:
            return replace(self, tokens=tokens, tokens_sha256=_sha256(tokens))

        return part(self.tokens[:count]), part(self.tokens[count:])

    def with_last(self, start: int, count: int) -> "Text":
        """The same blocks, with `count` of them, from `start` on, moved to the end."""
        tokens = self.tokens
        moved = torch.cat([tokens[:start], tokens[start + count :], tokens[start : start + count]])
        return replace(self, tokens=moved, tokens_sha256=_sha256(moved))

    def require_within(self, vocabulary: int) -> None:
        """Raise `LayershareError` if there is a token that a model of so many tokens does not know."""
        require_known(int(self.tokens.max()), vocabulary)


def require_known(highest: int, vocabulary: int) -> None:
    """Raise `LayershareError` if a model of so many tokens does not know the token of the highest number."""
    if highest >= vocabulary:
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
    spare: int = 0,
    seed: int = SEED,
    vocabulary: int | None = None,
) -> Text:
    """Load a text as at most `blocks` blocks (`None`: all) of `length` tokens; warns if there are fewer.

    `spare`: so many blocks more, where the text has them.

    `source`: `wikitext2`, `c4`, `ptb`, `alpaca` (read through `datasets`), `stdlib` (the Python standard library's
    source on this machine), a `.txt`, `.jsonl` or `.parquet` file (field `text`, or `messages` for the tokenizer's chat
    template), a folder of them, or strings. `vocabulary`: how many tokens the model knows that reads the text.
    Raises `LayershareError` if the source is unknown or empty, no text, or shorter than one block, or has a token that
    the model does not know.
    """
    name, documents = read_documents(source, split, tokenizer)
    text_sha256 = text_digest(documents)
    if split == "test":
        documents = ["\n\n".join(documents)]
    # A few documents at a time: as Python integers, tokens take many times the memory that they take in a tensor.
    parts = [documents[start : start + 64] for start in range(0, len(documents), 64)]
    ids = torch.cat([_encode(tokenizer, part) for part in parts])
    count = len(ids) // length
    if count == 0:
        where = " (evaluation.length in a recipe)" if split == "test" else ""
        raise LayershareError(
            f"The text '{name}' has {len(ids)} tokens, less than one block of {length}; "
            f"give a longer text or a smaller length{where}."
        )
    if blocks is not None and count < blocks:
        warnings.warn(
            f"The text '{name}' has {count} blocks of {length} tokens, not the {blocks} asked for; all are taken.",
            stacklevel=2,
        )
    order = torch.arange(count)
    if split == "train":
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    tokens = ids[: count * length].view(count, length)[order[: None if blocks is None else blocks + spare]]
    text = Text(
        tokens=tokens,
        source=name,
        text_sha256=text_sha256,
        tokens_sha256=_sha256(tokens),
        bos=adds_bos(tokenizer),
    )
    if vocabulary is not None:
        text.require_within(vocabulary)
    return text


def text_digest(documents: Sequence[str]) -> str:
    """The SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256("\0".join(documents).encode()).hexdigest()


def _sha256(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def _encode(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> Tensor:
    encoded = tokenizer(documents, verbose=False, return_attention_mask=False)["input_ids"]
    return torch.tensor(list(chain.from_iterable(encoded)), dtype=torch.int64)


def read_documents(
    source: Source, split: Split, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[str, list[str]]:
    """A short name of the source and its documents. Raises `LayershareError` if there are none, as `load_text`."""
    source = as_source(source)
    if isinstance(source, list):
        name, documents = "strings", source
    elif str(source) in NAMED:
        name, documents = str(source), NAMED[str(source)](split)
    else:
        _require_path(str(source))
        name = Path(source).name or str(source)
        documents = list(read_files(Path(source), writer_of(tokenizer)))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise LayershareError(f"The text '{name}' is empty.")
    return name, documents


def as_source(source: Source) -> str | Path | list[str]:
    """A source as it is, strings as a list. Raises `LayershareError` for what is neither a name nor strings."""
    if isinstance(source, str | Path):
        return source
    if not isinstance(source, Iterable) or isinstance(source, Mapping | bytes | bytearray):
        raise LayershareError(
            f"A text is a name, a file, a folder or a list of strings, not of type '{type(source).__name__}'."
        )
    return [text_of(document, f"String {number} of the text") for number, document in enumerate(source, start=1)]


def name_of(source: str | Path | list[str]) -> str:
    """What stands for a source in a recipe: its name, or a digest of its strings."""
    if isinstance(source, list):
        return f"strings {text_digest(source)[:16]}"
    return str(source)


def _require_path(name: str) -> None:
    """Raise `LayershareError` if a name is neither a text's nor that of a file or folder, saying what it looks like."""
    if not name.strip():
        raise LayershareError(f"The text has no name; give {', '.join(sorted(NAMED))}, a file or a folder.")
    if os.path.lexists(name):
        text_of(name, "The name of the text")
    elif os.sep in name or name.startswith((".", "~")) or Path(name).suffix:
        raise LayershareError(f"There is no text file or folder '{name:.200}'.")
    else:
        raise unknown("text", name[:200], NAMED)


def _hub(split: Split, *, path: str, splits: dict[Split, str], field: str = "text", **options: Any) -> list[str]:
    from datasets import load_dataset

    chat: Chat = writer_of(None)
    if split not in splits:
        raise LayershareError(f"'{path}' has no held-out part; evaluate on another text, such as wikitext2.")
    files = options.pop("files", None)
    if files:
        options["data_files"] = {splits[split].partition("[")[0]: files[split]}
    with reading(f"The data set '{path}'", "check the connection, or give a local file"), asking_hub():
        rows = load_dataset(path, split=splits[split], **options)
        return [document_of(row, f"A row of '{path}'", chat, field) for row in rows]


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
