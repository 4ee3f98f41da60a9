"""What a finished folder consists of, so that one that has changed since is noticed: `manifest.json`.

It holds size and SHA-256 of every file, and of safetensors files also those of the header and of each tensor, so that a
fault has a name. It belongs to the folder that layershare wrote: whoever saves into it again makes it wrong.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from layershare.errors import LayershareError
from layershare.foreign import is_lfs_pointer, read_mapping, reading
from layershare.store import MANIFEST, checksum, write_json
from layershare.units import size

FORMAT = "sizes and SHA-256 of what layershare wrote; `layershare verify` checks them"
FREE = (
    *("*.md", "*.html", "*.svg", "*.png", "chat_template.*", "generation_config.json", "speed.json"),
    *("license*", "licence*", "copying*", "notice*", "use_policy*", "authors*"),
)
"""Files that people may change, in lower case; the model does not depend on them."""
_MEND = "make or fetch it again, or delete its manifest.json if it was changed on purpose"
_OURS = ("plan.json", "recipe.yaml", "heal.yaml", "quantize.yaml")
"""Files beside which a manifest is ours, whatever has become of it."""
_NAMED = 3
"""How many faults, and tensors of one file, a sentence names."""


@dataclass(frozen=True)
class Verified:
    """A folder in which nothing is damaged: how many files were checked, their bytes together, and what is not theirs.

    `files` is 0 if it has no manifest. `changed`: those of the files that people may change which are not as they were;
    `added`: what is there beside.
    """

    folder: str
    files: int
    bytes: int
    changed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.files:
            return (
                f"'{self.folder}' has no {MANIFEST}, so there is nothing to check it against: layershare writes one, "
                "save_pretrained does not."
            )
        sentence = f"'{self.folder}' is as it was written: {self.files} files, {size(self.bytes)}."
        sentence += f" Changed since, which they may be: {', '.join(self.changed)}." if self.changed else ""
        return sentence + (f" Added since, and not checked: {', '.join(self.added)}." if self.added else "")


def write_manifest(folder: Path) -> None:
    """Write the manifest of all the files that are in a folder now, but for hidden ones."""
    write_json(folder / MANIFEST, {"format": FORMAT, "files": {path.name: _entry(path) for path in _files(folder)}})


def verify(folder: str | Path) -> Verified:
    """Check that a finished folder is as layershare wrote it, every byte of it.

    Raises `LayershareError` if it is not, naming the files and tensors that are damaged or missing, or if there is no
    finished model. A folder without a manifest is nothing to raise for; the result says so.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LayershareError(f"There is no folder '{folder}'.")
    if not (folder / MANIFEST).is_file() and not (folder / "config.json").is_file():
        raise LayershareError(f"'{folder}' holds no finished model: it has neither {MANIFEST} nor config.json.")
    entries = _read(folder)
    if entries is None:
        return Verified(str(folder), 0, 0)
    require_whole(folder, weights=True, again=True)
    changed = [name for name in entries if _is_free(name) and _faults(folder / name, entries[name])]
    added = [path.name for path in _files(folder) if path.name not in entries]
    total = sum(entry["bytes"] for entry in entries.values())
    return Verified(str(folder), len(entries), total, tuple(changed), tuple(added))


_checked: dict[Path, list[tuple[str, int, int]]] = {}
"""Folder -> names, sizes and times of its files when its weights were found to be whole."""


def require_whole(folder: str | Path, *, weights: bool, mend: str = _MEND, again: bool = False) -> None:
    """Raise `LayershareError` if a folder has a manifest and is not what that says; `mend` is what to do then.

    Without `weights`, of these only the sizes are looked at, which takes no time. Weights that were whole, in files
    that have not been written since, are not read a second time, unless `again`.
    """
    folder = Path(folder)
    entries = _read(folder)
    if entries is None:
        return
    faults: list[str] = []
    with reading(f"A file in '{folder}'", mend):
        stamps = [(path.name, path.stat().st_size, path.stat().st_ctime_ns) for path in _files(folder)]
        whole = weights and (again or _checked.get(folder.absolute()) != stamps)
        for name, entry in entries.items():
            if not _is_free(name):
                faults += _faults(folder / name, entry, sizes_only="tensors" in entry and not whole)
    if faults:
        more = f", and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise LayershareError(f"'{folder}' is not as it was written: {', '.join(faults[:_NAMED])}{more}; {mend}.")
    if whole:
        _checked[folder.absolute()] = stamps


def _files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST and not path.name.startswith(".")
    )


def _is_free(name: str) -> bool:
    return any(fnmatch(name.lower(), pattern) for pattern in FREE)


def _entry(path: Path) -> dict[str, Any]:
    entry: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": checksum(path)}
    if path.suffix == ".safetensors":
        entry["header"] = checksum(path, *_header(path))
        entry["tensors"] = {name: checksum(path, begin, end) for name, begin, end in _tensors(path)}
    return entry


def _header(path: Path) -> tuple[int, int]:
    """Where the header of a safetensors file is, with the number before it that says its length."""
    with open(path, "rb") as file:
        return 0, 8 + struct.unpack("<Q", file.read(8))[0]


def _tensors(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, begin and end of each tensor of a safetensors file whose header is sound."""
    data = _header(path)[1]
    with open(path, "rb") as file:
        header = json.loads(file.read(data)[8:])
    for name, tensor in header.items():
        if name != "__metadata__":
            begin, end = tensor["data_offsets"]
            yield name, data + begin, data + end


def _faults(path: Path, entry: dict[str, Any], *, sizes_only: bool = False) -> list[str]:
    """What is wrong with a file, in words."""
    if not path.is_file():
        return [f"'{path.name}' is missing"]
    if is_lfs_pointer(path):
        return [f"'{path.name}' is a git-lfs pointer, not the file itself (run git lfs pull)"]
    count = path.stat().st_size
    if count < entry["bytes"]:
        return [f"'{path.name}' is cut off at {count:,} of {entry['bytes']:,} bytes"]
    if (sizes_only and count == entry["bytes"]) or checksum(path) == entry["sha256"]:
        return []
    if count > entry["bytes"] or "tensors" not in entry:
        return [f"'{path.name}' has changed"]
    if checksum(path, 0, min(count, _header(path)[1])) != entry.get("header"):
        return [f"the header of '{path.name}' is damaged"]
    damaged = [name for name, *place in _tensors(path) if checksum(path, *place) != entry["tensors"].get(name)]
    if not damaged:
        return [f"'{path.name}' has changed"]
    more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    return [f"the tensor '{damaged[0]}'{more} in '{path.name}' is damaged"]


def _read(folder: Path) -> dict[str, dict[str, Any]] | None:
    """File -> what our manifest says of it; `None` without one. Raises `LayershareError` if it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    with reading(f"The {MANIFEST} of '{folder}'", _MEND):
        manifest = read_mapping(path)
        entries = manifest.get("files")
        if _well_formed(entries):
            return entries
        if manifest.get("format") == FORMAT or any((folder / name).is_file() for name in _OURS):
            raise ValueError("it is damaged")
        return None  # another program's


def _well_formed(entries: Any) -> bool:
    return isinstance(entries, dict) and all(
        name == Path(name).name
        and isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("tensors", {}), dict)
        for name, entry in entries.items()
    )
