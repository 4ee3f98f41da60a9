"""Errors that a person can act on: one sentence that says what is wrong and what to do."""

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from pathlib import Path

LONGEST = 200
"""Characters of a name that are shown."""
_TOO_LONG = re.compile(rf"(\S{{{LONGEST - 20}}})\S+(\S{{20}})")


class LayershareError(Exception):
    """Something the user can mend. The command line prints the message and exits with code 2.

    Names in the message that are too long to be read, such as a file's content in place of its name, are cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_TOO_LONG.sub(r"\1…\2", message))


class NotFinite(LayershareError):
    """What was computed overflows the type that it is computed or stored in."""


class UnsupportedModelError(LayershareError):
    """The model is of a kind that cannot be compressed; the message names the reason."""


def how_to_install(extra: str = "") -> str:
    """What to do to get layershare, or one of its extras: nobody has published it yet."""
    what = f"'.[{extra}]'" if extra else "."
    return f"`pip install {what}` in a checkout of layershare"


def short(words: str) -> str:
    """The words, cut off where no one reads on."""
    return words if len(words) <= LONGEST else f"{words[: LONGEST - 1]}…"


def unknown(kind: str, word: str, known: Iterable[str]) -> LayershareError:
    """The error for a name that does not exist, with the nearest known name or all of them.

    `unknown("method", "basis_share", METHODS)` reads
    "Unknown method 'basis_share'. Did you mean 'basis-sharing'?".
    """
    names = sorted(known)
    near = get_close_matches(short(word), names, n=1, cutoff=0.5)
    every = ", ".join(names)
    every = every if len(every) <= 2 * LONGEST else f"{every[: 2 * LONGEST].rpartition(', ')[0]} …"
    hint = f"Did you mean '{near[0]}'?" if near else f"Known: {every}."
    return LayershareError(f"Unknown {kind} '{short(word)}'. {hint}")


def incomplete(source: str | Path, missing: Collection[str]) -> LayershareError:
    """The error for a checkpoint without some of its weights, which transformers would draw at random."""
    return LayershareError(
        f"The checkpoint '{source}' lacks {len(missing)} of its model's weights, among them '{min(missing)}'; "
        "use a complete checkpoint."
    )


def mismatched(name: str, there: Iterable[int], here: Iterable[int]) -> LayershareError:
    """The error for a tensor that has another shape in the checkpoint (`there`) than in the model of its config."""
    return LayershareError(
        f"'{name}' is {list(there)} in the checkpoint, but config.json makes it {list(here)}: "
        "config.json and weights are of different models."
    )


def quantized_with(method: str, cause: BaseException | None = None) -> UnsupportedModelError:
    """The error for a model that another tool quantized; `cause` is why it could not be loaded as it is."""
    words = "" if cause is None else f" and cannot be loaded here ({' '.join(str(cause).split())[:200]})"
    return UnsupportedModelError(
        f"This model is quantized with '{method}'{words}; start from the unquantized weights and quantize afterwards."
    )
