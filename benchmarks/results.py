"""Results of experiments, a line of JSON each in one file per benchmark, by name.

What they were made with, versions and machine, stands in the file once for all results that agree in it; a result names
it by a digest.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layershare.store import write_atomically

Values = dict[str, Any]
ENVIRONMENT = ("versions", "machine")
"""The parts of `report.results.environment` that many results share."""
CURVE = 20
"""Points that are kept of a training's curve."""


class Results:
    """The results in a file, which need not exist yet. Several processes may add to it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> dict[str, Values]:
        """Name -> result, with its environment, in order of names."""
        if not self.file.is_file():
            return {}
        lines = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
        environments = {line.pop("environment"): line for line in lines if "name" not in line}
        return {line.pop("name"): line | environments[line.pop("environment")] for line in lines if "name" in line}

    def put(self, name: str, result: Values) -> None:
        """Add a result, or replace that of the same name."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with _alone(self.file.parent):
            self.write({**self.read(), name: result})

    def write(self, results: dict[str, Values]) -> None:
        """Write these results and no others."""
        environments: dict[str, Values] = {}
        lines = []
        for name, result in sorted(results.items()):
            shared = {key: result[key] for key in ENVIRONMENT}
            digest = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:12]
            environments[digest] = shared
            own = {key: value for key, value in result.items() if key not in ENVIRONMENT}
            lines.append({"name": name, "environment": digest, **own})
        first = [{"environment": digest, **shared} for digest, shared in sorted(environments.items())]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (*first, *lines))
        write_atomically(self.file, text.encode())


def thinned(log: list[Values]) -> list[Values]:
    """A training's log with at most `CURVE` entries of each kind: the first, the last, and others evenly between."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    for place, entry in enumerate(log):
        kinds.setdefault(tuple(sorted(entry)), []).append(place)
    kept = {place for places in kinds.values() for place in _evenly(places)}
    return [entry for place, entry in enumerate(log) if place in kept]


def _evenly(places: list[int]) -> list[int]:
    if len(places) <= CURVE:
        return places
    return [places[round(i * (len(places) - 1) / (CURVE - 1))] for i in range(CURVE)]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes of ours from writing in a folder."""
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)
