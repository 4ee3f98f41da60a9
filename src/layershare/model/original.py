"""What belongs to a model beside config and weights: licence, the files of its tokenizer, where it comes from."""

import os
import re
import warnings
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedModel

from layershare.errors import LayershareError
from layershare.foreign import parse_yaml, read_text, reading, reason, require_file
from layershare.model.source import SAMPLE, resolve

LEGAL = ("*license*", "*licence*", "*copying*", "*notice*", "*use_policy*", "*use-policy*")
"""What the model may be used for: documents of these names, in whatever case."""
VOCABULARY = ("*tokenizer*.model*", "*piece*.model", "*.tiktoken", "tekken.json", "vocab.*", "merges.txt")
"""What its tokenizer was made from: `save_pretrained` leaves it out; others, such as llama.cpp's converter, read it."""
LARGEST = 64 << 20
"""Bytes of the largest such file that is copied."""
_DOCUMENTS = {"", ".txt", ".md", ".rst", ".pdf", ".html"}
_CARD = "README.md"
_FRONT = re.compile(r"\A\s*---[ \t]*\n(.*?\n)---[ \t]*(?:\n|\Z)", re.DOTALL)


def located(name: str) -> str:
    """A model's name as it can be read from any working directory: a folder's absolute path, a hub id as it is."""
    return str(Path(name).resolve()) if name != SAMPLE and os.path.isdir(name) else name


def source_of(model: PreTrainedModel) -> str | None:
    """The folder or hub id that a model in memory was loaded from; `None` if that is not certain."""
    name = located(model.name_or_path or "")
    from_hub = getattr(model.config, "_commit_hash", None) is not None
    return name if os.path.isdir(name) or from_hub else None


def files_of(source: str) -> Path | None:
    """The folder with a model's files, of a hub id that in the hub's cache; `None` if there is none.

    What this module looks for is fetched first, if the hub can be reached.
    """
    name = resolve(source)
    if os.path.isdir(name):
        return Path(name)
    spelled = [spell(pattern) for pattern in LEGAL for spell in (str.lower, str.upper, str.title)]
    with suppress(Exception):  # whatever becomes of a network: what is in the cache serves
        snapshot_download(name, allow_patterns=[_CARD, *spelled, *VOCABULARY])
    with suppress(HFValidationError):
        config = try_to_load_from_cache(name, "config.json")
        return Path(config).parent if isinstance(config, str) else None


def copy_side_files(folder: Path, to: Path, *, vocabulary: bool = True) -> None:
    """Copy the licence of the model in `folder` and what its tokenizer was made from, unless `to` has it already.

    Neither weights nor code, and nothing from outside the folder. Warns of what cannot be read. Raises `OSError` if a
    file cannot be written.
    """
    for path in sorted(folder.iterdir()):
        legal = path.suffix.lower() in _DOCUMENTS and any(fnmatchcase(path.name.lower(), each) for each in LEGAL)
        if not legal and not (vocabulary and any(fnmatchcase(path.name, each) for each in VOCABULARY)):
            continue
        if (to / path.name).exists():
            continue
        try:
            content = _read(path)
        except (OSError, ValueError) as error:
            warnings.warn(f"'{path.name}' of the original is not in the result: {reason(error)}.", stacklevel=2)
            continue
        (to / path.name).write_bytes(content)


def _read(path: Path) -> bytes:
    """A file's content. Raises `OSError` or `ValueError` if it is no file, too large, or outside the model's folder."""
    folder = require_file(path).parent.resolve()
    # In the hub's cache the files of a snapshot are links to the folder of its blobs.
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    real = path.resolve()
    if not (real.is_relative_to(folder) or real.is_relative_to(blobs)):
        raise ValueError("it lies outside the model's folder")
    if real.stat().st_size > LARGEST:
        raise ValueError(f"it is larger than {LARGEST >> 20} MB")
    return real.read_bytes()


def known_of(source: str, folder: Path | None) -> dict[str, Any]:
    """What a card says of the original: `license` with its name and link, and `base_model`, if it is on the hub.

    The licence stands in the original's own card, which is in its `folder`; where that is one of ours, the model that
    it names is the base. Warns if it cannot be read.
    """
    front: dict[str, Any] = {}
    if folder is not None and (folder / _CARD).exists():
        try:
            with reading(f"The {_CARD} of '{source}'", "write the original's licence into the result's by hand"):
                front = _front_matter(read_text(folder / _CARD))
        except LayershareError as error:
            warnings.warn(str(error), stacklevel=2)
    ours = isinstance(front.get("tags"), list) and "layershare" in front["tags"]
    known = {key: front.get(key) for key in ("license", "license_name", "license_link")}
    known["base_model"] = front.get("base_model") if ours else None
    if source != SAMPLE and not os.path.isdir(source):
        known["base_model"] = source
    return {key: value for key, value in known.items() if isinstance(value, str) and value}


def _front_matter(text: str) -> dict[str, Any]:
    """The values at the head of a card; none if it has no head. Raises `ValueError` or `yaml.YAMLError`."""
    if (found := _FRONT.match(text)) is None:
        return {}
    values = parse_yaml(found[1])
    if values is not None and not isinstance(values, dict):
        raise ValueError("its front matter is no mapping")
    return values or {}
