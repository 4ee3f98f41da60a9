"""Finished units of work on disk: safetensors files with checksums, written so that a kill leaves no half of one."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from layershare.disk import writing
from layershare.errors import LayershareError

MANIFEST = "manifest.json"
LOCK = "lock"
_LONGEST = 200
"""Characters of a file's name, of which systems allow 255 bytes."""


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary name for a file, which gets its own when it is whole and on the disk; it goes if that fails."""
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all; a pipe or device is written to as it is."""
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    with appearing(path) as temporary:
        temporary.write_bytes(data)


def to_json(value: Any, *, indent: int | None = 1) -> str:
    """JSON as our files have it; names of files that are no UTF-8 become escapes, which are read as the same names."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=as_json) + "\n"
    return text.encode(errors="backslashreplace").decode()


def as_json(value: Any) -> Any:
    """A value of dataclasses, dicts, lists, tuples and what JSON has as it would be read from JSON."""
    if is_dataclass(value):
        named = {each.name: getattr(value, each.name) for each in fields(value)}
        left_out = {x.name for x in fields(value) if "with" in x.metadata and named[x.metadata["with"]] is None}
        return {key: as_json(each) for key, each in named.items() if key not in left_out}
    if isinstance(value, Mapping):
        return {key: as_json(each) for key, each in value.items()}
    return [as_json(each) for each in value] if isinstance(value, list | tuple) else value


def written_with(name: str) -> Any:
    """The default, `None`, of a dataclass's field that JSON has not where the field `name` (or it itself) is `None`."""
    return field(default=None, metadata={"with": name})


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomically(path, to_json(value).encode())


def make_folder(folder: Path) -> None:
    """Make a folder and those around it, if need be. Raises `LayershareError` if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LayershareError(f"The folder '{folder}' cannot be made ({error.strerror}); name another one.") from error


@contextmanager
def only_one(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if need be; when this one dies, the system lets go of it.

    If another one is in it, raises `LayershareError`, or with `wait` warns and waits until it has left. Raises it, too,
    if the folder cannot be made.
    """
    make_folder(folder)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        sentence = f"Another process is working in '{folder}'"
        if not wait:
            raise LayershareError(f"{sentence}; wait until it is done, or name another folder.") from error
        warnings.warn(f"{sentence}: waiting until it is done.", stacklevel=3)
        lock.acquire(timeout=-1)
    try:
        yield
    finally:
        lock.release()


def checksum(path: Path, begin: int = 0, end: int | None = None) -> str:
    """The SHA-256 of a file, or of its bytes from `begin` to before `end`, in hexadecimal."""
    digest = hashlib.sha256()
    left = path.stat().st_size - begin if end is None else end - begin
    with open(path, "rb") as file:
        file.seek(begin)
        while left > 0 and (chunk := file.read(min(left, 1 << 22))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def read_manifest(file: Path) -> dict[str, Any]:
    """The content of a store's manifest; nothing if it is not there, or damaged."""
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


class Store:
    """A folder of finished units, each one safetensors file, and a manifest of what they are and their checksums.

    `identity` says what the units are made from (model, text, seed, …). Units of another identity, and files whose
    checksum does not match, count as not there: they are computed again and never used.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.identity = as_json(identity)
        self._units: dict[str, dict[str, Any]] = {}
        self._verified: set[str] = set()
        manifest = read_manifest(folder / MANIFEST)
        if manifest.get("identity") == self.identity:
            self._units = manifest["units"]

    def __contains__(self, unit: str) -> bool:
        """Whether the unit is there, whole and unchanged."""
        if unit not in self._units:
            return False
        path = self._path(unit)
        if unit not in self._verified and path.is_file() and checksum(path) == self._units[unit]["sha256"]:
            self._verified.add(unit)
        return unit in self._verified

    def __iter__(self) -> Iterator[str]:
        """The units that are there, in the order in which they were written."""
        return (unit for unit in self._units if unit in self)

    def write(self, unit: str, tensors: dict[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
        """Store a finished unit with some facts about it."""
        path = self._path(unit)
        with writing(self.folder):
            with appearing(path) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
                entry = {"sha256": checksum(temporary), "facts": dict(facts or {})}
            self._units[unit] = entry
            # Of all units again, for each of them: json is ten times as fast without indents.
            manifest = to_json({"identity": self.identity, "units": self._units}, indent=None)
            write_atomically(self.folder / MANIFEST, manifest.encode())
        self._verified.add(unit)

    def read(self, unit: str, name: str) -> Tensor:
        """One tensor of a unit, backed by the file. Raises `LayershareError` if the unit is not there whole."""
        if unit not in self:
            raise LayershareError(
                f"'{self._path(unit)}' is missing or damaged; run the command that made it again to compute it anew."
            )
        with safe_open(self._path(unit), framework="pt") as file:
            return file.get_tensor(name)

    def names(self, unit: str) -> list[str]:
        """Names of the tensors of a unit that is there."""
        with safe_open(self._path(unit), framework="pt") as file:
            return list(file.keys())

    def facts(self, unit: str) -> dict[str, Any]:
        """What was noted about a unit when it was written."""
        return self._units[unit]["facts"]

    def _path(self, unit: str) -> Path:
        """Its file; names that are too long for one are told by their hash."""
        name = unit if len(unit) <= _LONGEST else hashlib.sha256(unit.encode()).hexdigest()
        return self.folder / f"{name}.safetensors"
