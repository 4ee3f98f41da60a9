"""What the verbs print and write."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

from layershare.console import say
from layershare.errors import LayershareError
from layershare.foreign import reading

if TYPE_CHECKING:
    from layershare.bars import Steps
    from layershare.evaluate.evaluator import Measured

console = Console()
_complaints = Console(stderr=True)


def show(table: RenderableType) -> None:
    """Print a table, or a line above one."""
    console.print(table)


def tell(sentence: str) -> None:
    """Print a sentence."""
    say(console, sentence)


def complain(sentence: str, color: str) -> None:
    """Print a sentence on standard error."""
    say(_complaints, sentence, color)


def print_json(value: Any) -> None:
    """Print JSON, in ASCII."""
    from layershare.store import as_json

    print(json.dumps(as_json(value), indent=1))


def print_evaluation(measured: "Measured") -> None:
    """Print what was measured of a model's quality."""
    from layershare.report.listing import evaluation_table, tasks_table

    if measured.text is not None:
        show(evaluation_table(measured.text, measured))
    if measured.tasks is not None:
        show(tasks_table(measured.tasks, measured.original_tasks))


def progress() -> "Steps":
    """How far the steps are, on standard error; other libraries' bars are silenced."""
    from layershare.bars import steps

    quiet()
    return steps(_complaints)


def quiet() -> None:
    """Leave the terminal to our own progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def require_parent(file: Path | None) -> None:
    """Raise `LayershareError` if a file cannot be written because of its name, or where there is no folder for it."""
    if file is None:
        return
    with reading(f"The file '{file}'", "name another one"):
        file.exists()  # or no file can be called so
    if not file.absolute().parent.is_dir():
        raise LayershareError(f"There is no folder '{file.parent}' for '{file.name}'; make it first.")


def write(file: Path, text: str) -> None:
    """Write a file whole."""
    from layershare.disk import OTHER_FILE, writing
    from layershare.store import write_atomically

    with writing(file, OTHER_FILE):
        write_atomically(file, text.encode())
