"""`--path NAME=PATH` of the benchmarks: where the models and texts are that their matrices name."""

import sys
from argparse import ArgumentParser
from pathlib import Path

from layershare.model.source import SAMPLE


def add_path(parser: ArgumentParser) -> None:
    """Let a command take `--path`, as often as there are names."""
    parser.add_argument("--path", action="append", default=[], metavar="NAME=PATH", help="where a model or text is")


def paths_of(given: list[str]) -> dict[str, str]:
    """Name -> path, of what was given. Exits if there is nothing at a path."""
    paths = dict(each.split("=", 1) for each in given)
    for path in paths.values():
        if not Path(path).exists():
            sys.exit(f"There is no '{path}'.")
    return paths


def is_here(model: str, paths: dict[str, str]) -> bool:
    """Whether a model is here; says how to tell where it is, if not."""
    if model == SAMPLE or model in paths:
        return True
    print(f"{model}: left out; say where it is with --path {model}=FOLDER")
    return False
