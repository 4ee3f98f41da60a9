"""Progress for people: a bar per step on standard error, and nobody else's."""

import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partialmethod
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from layershare.healing.training import Say
    from layershare.run import Report

_TALKATIVE = ("lm_eval", "datasets", "transformers", "huggingface_hub")


@contextmanager
def bars(console: Console) -> "Iterator[tuple[Report, Say]]":
    """A bar per step, with the time left, and what prints a line above the bars."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:<10}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as lines:

        def report(step: str) -> Callable[[int, int], None]:
            task = lines.add_task(step, total=None)
            return lambda done, total: lines.update(task, completed=done, total=total)

        yield report, lambda line: lines.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def shown(progress: bool | None) -> "Iterator[tuple[Report, Say]]":
    """Bars for the Python interface, or nothing; `None`: bars where standard error is a terminal."""
    from transformers.utils import logging as others

    if not (sys.stderr.isatty() if progress is None else progress):
        yield (lambda step: lambda done, total: None), lambda line: None
        return
    enabled = others.is_progress_bar_enabled()
    others.disable_progress_bar()
    try:
        with bars(Console(stderr=True)) as both:
            yield both
    finally:
        if enabled:
            others.enable_progress_bar()


@contextmanager
def alone() -> Iterator[None]:
    """Leave the terminal to our own progress: other libraries' bars, prints, warnings and notes are not shown."""
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels, begin = [logger.level for logger in loggers], tqdm.__init__
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            setattr(tqdm, "__init__", partialmethod(begin, disable=True))  # noqa: B010
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            setattr(tqdm, "__init__", begin)  # noqa: B010
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
