"""Progress for people: a bar for each step in a terminal, a line for each anywhere else, and nobody else's."""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from functools import partialmethod
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from layershare.console import say
from layershare.progress import Announce, Progress, Say, no_progress, say_nothing, silent
from layershare.units import clock_time

Steps: TypeAlias = AbstractContextManager[tuple[Announce, Say]]
"""What announces the steps, and what prints a line above the bars."""
_TALKATIVE = ("lm_eval", "datasets", "transformers", "huggingface_hub", "torch")


class TimeColumn(ProgressColumn):
    """The time that is left, where that can be told; otherwise the time so far, or in all."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """`about 1:30 left`, `0:12 so far` or `took 2:05`."""
        if task.finished:
            return Text(f"took {clock_time(task.finished_time or 0)}")
        if task.total is None or task.time_remaining is None:
            return Text(f"{clock_time(task.elapsed or 0)} so far")
        return Text(f"about {clock_time(task.time_remaining)} left")


@contextmanager
def steps(console: Console) -> Iterator[tuple[Announce, Say]]:
    """What announces a step and gives the function that takes its progress, and what prints a line above the bars."""
    if not console.is_terminal:

        def announce(step: str) -> Progress:
            say(console, f"{step} …")
            return no_progress

        yield announce, lambda line: say(console, line)
        return
    columns = (TextColumn("{task.description:<10}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeColumn())
    with Bars(*columns, console=console) as bars:

        def finish() -> None:
            for task in bars.tasks[-1:]:
                total = task.total or 1
                bars.update(task.id, completed=total, total=total)

        def announce(step: str) -> Progress:
            finish()
            task: TaskID = bars.add_task(step, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield announce, lambda line: say(bars.console, line)
        finish()


@contextmanager
def shown(progress: bool | None) -> Iterator[tuple[Announce, Say]]:
    """Bars for the Python interface, or nothing; `None`: bars where standard error is a terminal."""
    from transformers.utils import logging as others

    if not (sys.stderr.isatty() if progress is None else progress):
        yield silent, say_nothing
        return
    enabled = others.is_progress_bar_enabled()
    others.disable_progress_bar()
    try:
        with steps(Console(stderr=True)) as both:
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
