"""The disk and its troubles, no room, a quota, no permission, a folder that goes away: each becomes a sentence here."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from layershare.errors import LayershareError
from layershare.units import size

CONTINUES = "mend that, and the same command continues"
OTHER_FILE = "mend that, or name another file"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries that are written in Rust, such as safetensors, spell what the system said."""
_TORCH = ("inline_container", "PytorchStreamWriter")
"""In what torch says when `torch.save` could not write; it does not say why."""


def require_disk(needs: dict[Path, int]) -> None:
    """Raise `LayershareError` if a disk has fewer bytes free than those of these folders need that are on it."""
    disks: dict[int, list[Path]] = {}
    for folder in needs:
        disks.setdefault(_existing(folder).stat().st_dev, []).append(folder)
    for folders in disks.values():
        needed, free = sum(needs[folder] for folder in folders), _free(folders[0])
        if needed > free:
            where = " and ".join(f"'{folder}'" for folder in folders if needs[folder])
            raise LayershareError(
                f"The run needs about {size(needed)} of disk in {where}, where {size(free)} are free; "
                "free some or name another folder."
            )


def still_needed(needed: int, folder: Path) -> int:
    """What is left of these bytes beside the files that an earlier run has left in a folder."""
    held = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # another process is at work there
                held += (Path(place) / name).stat().st_size
    return max(0, needed - held)


@contextmanager
def writing(place: Path, advice: str = CONTINUES, needed: int = 0) -> Iterator[None]:
    """Turn whatever the system says while something is written to `place` into a `LayershareError`.

    `advice`: what to do; `needed`: the bytes that all of it needs there, if known. Other errors pass as they are.
    """
    try:
        yield
    except LayershareError:
        raise
    except Exception as error:  # libraries have errors of their own for a full disk
        found = trouble(error)
        if found is None:
            raise
        number, words, file = found
        if file is not None and not file.startswith(str(place)):
            words += f": '{file}'"
        if number == errno.ENOSPC:
            words += f"; {size(_free(place))} are free"
        if number in FULL and needed:
            words += f"; about {size(needed)} are needed in all"
        raise LayershareError(f"'{place}' cannot be written ({words}): {advice}.") from error


def trouble(error: BaseException) -> tuple[int | None, str, str | None] | None:
    """What the system said, if that is what an exception is about: number and words, and the file, where it is known.

    An error that another one was made from counts, and so does a full disk in one that was being dealt with.
    """
    link: BaseException | None = error
    direct = True
    while link is not None:
        said = _said(link)
        if said is not None and (direct or said[0] in FULL):
            return said
        direct = direct and link.__cause__ is not None
        link = link.__cause__ or link.__context__
    return None


def _said(error: BaseException) -> tuple[int | None, str, str | None] | None:
    if isinstance(error, OSError):
        words = " ".join((error.strerror or str(error)).split())
        words = words[:1].lower() + words[1:]
        return error.errno, words, None if error.filename is None else str(error.filename)
    if found := _OS_ERROR.search(str(error)):
        return int(found[1]), os.strerror(int(found[1])).lower(), None
    if isinstance(error, RuntimeError) and any(word in str(error) for word in _TORCH):
        return errno.ENOSPC, "a file could not be written to its end", None
    return None


def _free(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    """A folder, or the nearest above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
