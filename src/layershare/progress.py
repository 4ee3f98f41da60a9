"""Who does long work tells how far it is: nothing here knows who listens."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the amount of work done and the amount there is."""
Announce: TypeAlias = Callable[[str], Progress]
"""Announces a step and gives the function that takes its progress."""
Say: TypeAlias = Callable[[str], None]
"""Takes a line about how the work goes."""


def no_progress(done: int, total: int) -> None:
    """Take no notice of progress."""


def part(progress: Progress, number: int, count: int) -> Progress:
    """The progress of one of `count` parts of some work that take equally long, `number` from 0."""
    return lambda done, total: progress(number * total + done, count * total)


def silent(step: str) -> Progress:
    """Announce nothing."""
    return no_progress


def say_nothing(line: str) -> None:
    """Take no notice of a line."""


class Clock:
    """Announces steps and keeps their wall time in seconds."""

    def __init__(self, announce: Announce) -> None:
        self.seconds: dict[str, float] = {}
        self._announce = announce

    @contextmanager
    def step(self, name: str) -> Iterator[Progress]:
        """Announce and time a step; gives the function that takes its progress."""
        start = time.perf_counter()
        yield self._announce(name)
        self.seconds[name] = round(time.perf_counter() - start, 3)
