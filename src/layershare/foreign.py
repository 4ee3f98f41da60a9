"""Files that others made: whatever reading one raises becomes one sentence, here and nowhere else."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from layershare.errors import LayershareError

DEPTH = 64
"""How deeply a file's lists and mappings may be nested; no config, recipe or result comes near it."""
LARGEST = 256 << 20
"""Bytes of the largest JSON or YAML file that is read, against what would fill the memory."""
_LFS = b"version https://git-lfs.github.com/spec/"


@contextmanager
def reading(what: str, advice: str) -> Iterator[None]:
    """Turn anything that goes wrong while a foreign file is read into a `LayershareError`.

    `reading("The config.json of 'm'", "fetch or write it again")` gives "The config.json of 'm' cannot be used (it is
    not JSON: …): fetch or write it again." A `LayershareError` passes as it is.
    """
    try:
        yield
    except LayershareError:
        raise
    except Exception as error:  # whatever a parser, a library or a model's own code raises
        raise LayershareError(f"{what} cannot be used ({reason(error)}): {advice}.") from error


def reason(error: BaseException) -> str:
    """What an exception says, in at most one line that a person can read."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON: {error.msg} in line {error.lineno}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"it is not YAML: {error.problem} in line {error.problem_mark.line + 1}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    words = " ".join(str(error).split()).rstrip(".")
    words = words if len(words) <= 200 else f"{words[:199]}…"
    speaks = isinstance(error, ValueError | OSError | LayershareError) and words
    return words if speaks else f"{type(error).__name__}: {words}"


def require_file(path: Path) -> Path:
    """The path, if it is an ordinary file: a pipe or device would be waited for.

    Raises `OSError` if it is none; git-lfs pointers, which stand in for files that were not fetched, are no files.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no '{path.name}'")
    if not path.is_file():
        raise OSError(f"'{path.name}' is no file")
    if is_lfs_pointer(path):
        raise OSError(f"'{path.name}' is a git-lfs pointer, not the file itself; run git lfs pull")
    return path


def is_lfs_pointer(path: Path) -> bool:
    """Whether git-lfs left its note in place of the file."""
    with open(path, "rb") as file:
        return file.read(len(_LFS)) == _LFS


def read_text(path: Path) -> str:
    """A file's text, which must be UTF-8 (with or without a mark). Raises `OSError` or `ValueError`; see `reading`."""
    if (size := require_file(path).stat().st_size) > LARGEST:
        raise ValueError(f"it has {size} bytes, which no file of its kind has")
    return path.read_text(encoding="utf-8-sig")


def read_json(path: Path) -> Any:
    """A file's JSON value. Raises as `read_text`, and `ValueError` if it is no JSON or nested too deeply."""
    return _shallow(json.loads(read_text(path)))


def read_mapping(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises as `read_json`, and `ValueError` if it is another value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {_kind(value)}, not an object")
    return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, in which a key stands once and nothing refers to something else.

    Raises `ValueError` or `yaml.YAMLError`.
    """
    return yaml.load(text, _StrictLoader)


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML, without what YAML resolves silently: a key that is given twice, and references to other parts."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "references (*) are not read here", self.peek_event().start_mark)
        self.depth += 1
        if self.depth > DEPTH:
            raise ValueError(f"it is nested more than {DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                problem = f"the key '{key}' is given twice"
                raise ConstructorError(None, None, problem, node.value[place][0].start_mark)
        return super().construct_mapping(node, deep)


def _shallow(value: Any) -> Any:
    level = [value]
    for _ in range(DEPTH):
        level = [item for each in level if isinstance(each, dict | list) for item in _items(each)]
        if not level:
            return value
    raise ValueError(f"it is nested more than {DEPTH} levels deep")


def _items(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {list: "a list", str: "a string", bool: "a truth value"}.get(type(value), "a number")
