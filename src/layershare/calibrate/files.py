"""Documents in files: what is text, in which encoding, and what is refused, with the place in the file."""

import codecs
import json
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from layershare.errors import LayershareError
from layershare.foreign import is_lfs_pointer, reading

_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
_CHUNK = 1 << 20
_CONTROLS = frozenset(range(32)) - frozenset(b"\t\n\v\f\r\x1b")

Chat = Callable[[Any], str]
"""Writes the messages of a conversation out, as a tokenizer's chat template says."""


def read_files(path: Path, chat: Chat) -> Iterator[str]:
    """The documents of a text file, or of all text files in a folder, ordered by path.

    Other files in the folder are passed over with a warning; links to folders are not followed. Raises
    `LayershareError` for what is not there, or is no text that is read.
    """
    for file in _files_in(path) if path.is_dir() else [path]:
        if not file.exists():
            raise LayershareError(f"There is no text file '{file}'.")
        if not file.is_file():
            raise LayershareError(f"'{file}' is a pipe, device or socket; write the text to a file first.")
        if file.suffix.lower() not in READERS:
            raise LayershareError(f"'{file.name}' is not of a kind that is read; give {KINDS}, or a folder of them.")
        with reading(f"The text '{file}'", "write it again, or leave it out"):
            if is_lfs_pointer(file):
                raise ValueError("it is a git-lfs pointer, not the file itself; run git lfs pull")
            yield from READERS[file.suffix.lower()](file, chat)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Where a value is, for messages, and the value, for each line of a JSONL file that is not blank.

    Raises `LayershareError` for a line that is not JSON, and as `encoding_of`.
    """
    with open(path, encoding=encoding_of(path), newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"Line {number} of '{path.name}'"
                with reading(where, "mend that line, or leave it out"):
                    try:
                        value = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise LayershareError(
                            f"{where} is not JSON ({error.msg}); mend it, or leave it out."
                        ) from error
                yield where, value


def encoding_of(path: Path) -> str:
    """The encoding of a text file: UTF-8, or what its mark (BOM) says.

    Raises `LayershareError`, naming the place, for a file that is not text in that encoding: it has been read to its
    end.
    """
    with open(path, "rb") as file:
        start = file.read(4)
        encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
        file.seek(0)
        decoder, place = codecs.getincrementaldecoder(encoding)(), 0
        for chunk in chain(iter(partial(file.read, _CHUNK), b""), [b""]):
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                _refuse(path, encoding, place + len(chunk) - len(error.object) + error.start, chunk)
            if "\0" in text:
                raise LayershareError(
                    f"'{path}' holds NUL characters, as binary files do, and UTF-16 without a mark; give UTF-8 text."
                )
            place += len(chunk)
    return encoding


def _refuse(path: Path, encoding: str, place: int, chunk: bytes) -> NoReturn:
    """Raise `LayershareError` for a file with a byte that is not in its encoding."""
    if encoding != "utf-8":
        raise LayershareError(
            f"'{path}' begins with the mark of {encoding.upper().removesuffix('-SIG')} but is damaged at byte {place}; "
            "write it again."
        )
    if _CONTROLS & set(chunk):
        raise LayershareError(f"'{path}' is a binary file, not text (byte {place} is not UTF-8); give {KINDS}.")
    raise LayershareError(
        f"'{path}' is not UTF-8 (byte {place}); if it comes from Windows, convert it with "
        "iconv -f WINDOWS-1252 -t UTF-8."
    )


def _files_in(folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise error

    with reading(f"The folder '{folder}'", "name another one"):
        walk = list(os.walk(folder, onerror=fail))
    files = sorted(Path(here) / name for here, _, names in walk for name in names)
    found = [file for file in files if file.suffix.lower() in READERS]
    if not found:
        raise LayershareError(f"The folder '{folder}' has no {', '.join(READERS)} file.")
    if others := [file.name for file in files if file.suffix.lower() not in READERS]:
        warnings.warn(
            f"Of the {len(files)} files in '{folder}', {len(others)} are not {KINDS} and are passed over, such as "
            f"'{others[0]}'.",
            stacklevel=2,
        )
    return found


def _read_txt(path: Path, chat: Chat) -> Iterator[str]:
    yield path.read_text(encoding=encoding_of(path))


def _read_jsonl(path: Path, chat: Chat) -> Iterator[str]:
    for where, row in json_lines(path):
        yield document_of(row, where, chat)


def _read_parquet(path: Path, chat: Chat) -> Iterator[str]:
    from pyarrow.parquet import ParquetFile

    number = 0
    with ParquetFile(path) as file:
        columns = [name for name in ("text", "messages") if name in file.schema_arrow.names]
        if not columns:
            document_of(dict.fromkeys(file.schema_arrow.names), f"'{path.name}'", chat)
        for batch in file.iter_batches(1024, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield document_of(row, f"Row {number} of '{path.name}'", chat)


def document_of(row: Any, where: str, chat: Chat, field: str = "text") -> str:
    """The document in a row: its `field`, or else its `messages` written out.

    Raises `LayershareError` if it has neither, or what it has is no text.
    """
    if isinstance(row, dict) and field not in row and "messages" in row:
        with reading(f"The `messages` of {where[0].lower()}{where[1:]}", "compare them with the chat template"):
            return text_of(chat(row["messages"]), where)
    if not isinstance(row, dict) or field not in row:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise LayershareError(f"{where} has no field '{field}' (found: {found:.80}); rename the text's field to it.")
    return text_of(row[field], f"{where} has a '{field}' that")


def text_of(value: Any, what: str) -> str:
    """The value, if it is text. Raises `LayershareError` if it is something else, or holds half a character."""
    if not isinstance(value, str):
        raise LayershareError(f"{what} is no text ({value!r:.40}); leave it out.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise LayershareError(
                f"{what} holds half a character (a lone surrogate, {value[error.start]!a}); leave it out."
            ) from error
    return value


def writer_of(tokenizer: PreTrainedTokenizerBase | None) -> Chat:
    """What writes conversations out: a tokenizer's chat template. Raises `LayershareError` without one when called."""

    def write_out(messages: Any) -> str:
        if tokenizer is None or not tokenizer.chat_template:
            raise LayershareError(
                "The text holds conversations (`messages`), and the model's tokenizer has no chat template to write "
                "them out with; give rows with a `text`."
            )
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False)
        # The tokenizer puts this token before each document itself.
        return text.removeprefix(str(tokenizer.bos_token)) if adds_bos(tokenizer) else text

    return write_out


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its beginning-of-sequence token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


READERS: dict[str, Callable[[Path, Chat], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
KINDS = "a .txt, .jsonl or .parquet file"
