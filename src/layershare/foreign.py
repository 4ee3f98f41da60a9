"""Files that others made: whatever reading one raises becomes one sentence, here and nowhere else."""

import json
import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from layershare.disk import FULL, trouble
from layershare.errors import LayershareError, short

DEPTH = 64
"""How deeply a file's lists and mappings may be nested; no config, recipe or result comes near it."""
LARGEST = 256 << 20
"""Bytes of the largest JSON or YAML file that is read, against what would fill the memory."""
LARGEST_YAML = 1 << 20
"""Characters of the longest YAML that is read: it takes minutes where JSON takes seconds."""
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
        if (found := trouble(error)) is not None and found[0] in FULL:  # what is fetched or converted is also written
            raise LayershareError(
                f"{short(what)} cannot be read without room on the disk ({found[1]}); make some, and run the command "
                "again."
            ) from error
        raise LayershareError(f"{short(what)} cannot be used ({reason(error)}): {advice}.") from error


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
    words = short(" ".join(str(error).split()).rstrip("."))
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


def parse_json(text: str) -> Any:
    """The value of a JSON text in which a key stands once. Raises `ValueError`, also if it is nested too deeply."""
    return _shallow(json.loads(text, object_pairs_hook=_once))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, in which a key stands once and nothing refers to something else.

    Words are read as YAML 1.2 does: `1e-4` is a number, while `on`, `1:30`, `010` and dates are words. Raises
    `ValueError` or `yaml.YAMLError`.
    """
    if len(text) > LARGEST_YAML:
        raise ValueError(f"it has {len(text):,} characters, which no file of its kind has")
    return yaml.load(text, _StrictLoader)


def write_yaml(value: Any) -> str:
    """A value as YAML that both `parse_yaml` and readers of YAML 1.1 read as it is."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


_WORDS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9](_?[0-9])*)|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?([0-9](_?[0-9])*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
"""What a plain word of YAML is by its form, and the characters that it may begin with."""


class _Dumper(yaml.SafeDumper):
    """Quotes what is no string to YAML 1.1 or 1.2."""


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML, without what YAML resolves silently: a key that is given twice, and references to other parts."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # not those of YAML 1.1
    depth = 0

    def construct_yaml_int(self, node: Any) -> int:
        return int(self.construct_scalar(node), 0)

    def construct_yaml_float(self, node: Any) -> float:
        word = self.construct_scalar(node).replace("_", "").lower()
        return float(word.replace(".inf", "inf").replace(".nan", "nan"))

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
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ConstructorError(None, None, "found unhashable key", key_node.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"the key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


for _tag, (_form, _first) in _WORDS.items():
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), _first)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_float)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in found if names.count(name) > 1)}' is given twice")
    return found


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
