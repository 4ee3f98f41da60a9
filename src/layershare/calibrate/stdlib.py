"""The source of this machine's Python standard library: real text that needs no download."""

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from layershare.errors import LayershareError

HELD_OUT = (
    "argparse",
    "bisect",
    "calendar",
    "csv",
    "fractions",
    "heapq",
    "json",
    "queue",
    "sched",
    "shelve",
    "statistics",
    "tarfile",
    "textwrap",
    "wsgiref",
)
"""Top-level modules of the test split: in every Python since 3.10, 4 to 5 % of the text, of many kinds."""

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
_SITE_FILES = {"sitecustomize.py", "usercustomize.py"}
_TABLES = {"html/entities.py", "encodings/aliases.py"}
_CODE_PAGE = ("decoding_table = (", "decoding_map = ")


def documents(split: Literal["train", "test"]) -> list[str]:
    """Source files of the standard library, one string per file, ordered by path.

    `test` holds the modules named in `HELD_OUT`, `train` all others. Left out: installed packages, tests, what the
    build of Python wrote for one machine, and tables of data (character sets, entities, help topics), which would
    drown the code. The text differs between Python versions.

    Raises:
        LayershareError: the source of the standard library is not installed here.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(_sources(root), key=lambda path: path.relative_to(root).as_posix()):
        top = path.relative_to(root).parts[0].removesuffix(".py")
        if (top in HELD_OUT) == (split == "test"):
            with tokenize.open(path) as file:  # UTF-8 unless the file itself declares another encoding
                text = file.read()
            if text.strip() and not (top == "encodings" and any(mark in text for mark in _CODE_PAGE)):
                found.append(text)
    if not found:
        raise LayershareError(
            f"The Python standard library's source is not installed here (no .py files for '{split}' in {root}): "
            "use another text, or a Python that comes with its source."
        )
    return found


def _sources(root: Path) -> Iterator[Path]:
    """The modules in `root` and in its packages; a folder whose name is not a package's is not entered."""
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = [name for name in folders if name.isidentifier() and name not in _SKIPPED_FOLDERS]
        for name in files:
            path = here / name
            if (
                name.endswith(".py")
                and not name.startswith("_sysconfigdata")
                and not (here == root and name in _SITE_FILES)
                and path.relative_to(root).as_posix() not in _TABLES
            ):
                yield path
