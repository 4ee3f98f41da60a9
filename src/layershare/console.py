"""Sentences for a terminal, a file or a pipe, in whatever encoding it has."""

import codecs
import io
import sys
import unicodedata

from rich.console import Console

_LIKE = str.maketrans({"–": "-", "—": "-", "−": "-", "×": "x", "…": "...", "‘": "'", "’": "'", "“": '"', "”": '"'})


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a sentence as it is: broken between words in a terminal, whole into a file or pipe."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def speak_any_encoding() -> None:
    """Let standard output and error take any text: what they lack gets its nearest likeness, or a question mark."""
    codecs.register_error("likeness", _likeness)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="likeness")


def _likeness(error: UnicodeError) -> tuple[str, int]:
    """The handler of a codec: what to write in place of what cannot be encoded."""
    assert isinstance(error, UnicodeEncodeError)
    plain = unicodedata.normalize("NFKD", error.object[error.start : error.end].translate(_LIKE))
    letters = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return letters.encode("ascii", "replace").decode(), error.end
