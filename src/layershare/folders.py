"""The folder of a run: what may be in it before, where work lies while it is unfinished, how it becomes a whole model.

While a run is unfinished, its output folder holds nothing but `.run`: the recipe, statistics, solved groups and the
checkpoint in the making. The finished files are moved out of it as the last step, `config.json` last of all, so that
the folder is a whole model or none.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from layershare.disk import writing
from layershare.errors import LayershareError
from layershare.foreign import read_text, reading
from layershare.manifest import require_whole, write_manifest
from layershare.store import LOCK, MANIFEST, make_folder, only_one, write_atomically

WORK = ".run"
PLAN = "plan.json"
RECIPE = "recipe.yaml"
HEAL = "heal.yaml"
"""The recipe of a healing, beside which that of the compression lies."""
QUANTIZE = "quantize.yaml"
"""How a finished folder was quantized; beside it may lie how that was made."""
_RECORDS = (PLAN, RECIPE, HEAL)
_STAGING = ".new-"
"""How the names begin of folders in which files wait until all are there."""
MEND = "mend that, or name another folder"
AGAIN = "delete the folder, so that the command can make it again, or name another one"
"""What to do about a finished folder that is damaged."""


def has_records(folder: Path) -> bool:
    """Whether a folder tells how it was made, and its `results.json` is ours."""
    return any((folder / name).is_file() for name in _RECORDS)


def copy_records(folder: Path, staging: Path) -> None:
    """Copy what tells how a finished folder was made, as far as it is there."""
    for name in _RECORDS:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staging / name)


def was_compressed(folder: Path) -> bool:
    """Whether a folder has the plan and the recipe of a compression, of which pages tell."""
    return (folder / PLAN).is_file() and (folder / RECIPE).is_file()


def is_finished(out: Path, recipe: str, name: str = RECIPE) -> bool:
    """Whether `out` holds the run of this very recipe, finished; `name` is that of the recipe's file.

    Raises `LayershareError` if it is a file, or holds something else than that run, finished or not, or if what is
    finished has changed since.
    """
    if not require_folder(out).exists():
        return False
    if not (out / WORK).exists() or (out / "config.json").is_file():
        require_whole(out, weights=False, mend=AGAIN)
    names = [each for each in (QUANTIZE, HEAL, RECIPE) if (out / each).is_file()]
    finished = (out / "config.json").is_file() and names[:1] == [name]
    place = out if finished else out / WORK
    if (place / name).is_file():
        with reading(f"The {name} in '{place}'", AGAIN):
            same = read_text(place / name) == recipe
        if same:
            if finished:
                require_whole(out, weights=True, mend=AGAIN)
            return finished
        state = "a finished" if finished else "an unfinished"
        raise LayershareError(
            f"The folder '{out}' holds {state} run of another recipe; delete it or name another folder."
        )
    if not _killed_at_once(out, name):
        require_new(out)
    return False


def _killed_at_once(out: Path, name: str) -> bool:
    """Whether there is nothing but what a run leaves that is killed before it has written its recipe."""
    if [path.name for path in out.iterdir()] != [WORK]:
        return False
    return {path.name for path in (out / WORK).iterdir()} <= {LOCK, f"{name}.part"}


def require_new(out: Path) -> None:
    """Raise `LayershareError` if there is anything at `out` but an empty folder."""
    if require_folder(out).exists() and any(out.iterdir()):
        raise LayershareError(f"The output folder '{out}' is not empty; delete it or name another folder.")


def require_folder(path: Path) -> Path:
    """The path, if a folder is there or can be. Raises `LayershareError` if it, or a part of it, is something else."""
    with writing(path, "name another folder"):
        for part in (path, *path.parents):
            if part.exists() and not part.is_dir():
                raise LayershareError(f"'{part}' is a file; name a folder.")
    return path


def require_stats_folder(path: Path) -> Path:
    """The path, as `require_folder`, for statistics. Raises `LayershareError`, too, if a model is there."""
    if (require_folder(path) / "config.json").exists():
        raise LayershareError(f"'{path}' is the folder of a model; name another one for the statistics.")
    return path


@contextmanager
def work_folder(out: Path, recipe: str, name: str = RECIPE, needed: int = 0) -> Iterator[Path]:
    """The folder in `out` for an unfinished run, which is gone after it; `name` is that of its recipe's file.

    If the run fails before any work is finished, the folder is removed, and so are those around it that were made for
    it and hold nothing else. Raises `LayershareError` if it cannot be made or written to (`needed` bytes will be), or
    if another process works in it.
    """
    work = out / WORK
    with writing(out, needed=needed):
        made = _missing(work)
        with only_one(work):
            try:
                write_atomically(work / name, recipe.encode())
                yield work
            except Exception:
                if made and not [*work.rglob("*.safetensors"), *work.glob("plan-*.json")]:  # no finished work to keep
                    shutil.rmtree(work, ignore_errors=True)
                    _remove_empty(made[1:])
                raise
            shutil.rmtree(work)


@contextmanager
def staged(out: Path, needed: int = 0, *, new: bool = False) -> Iterator[Path]:
    """A folder for the files of a model that then come into `out` together, or not at all.

    Raises `LayershareError` if they cannot be written (`needed` bytes will be), and, for one that is to be `new`, if
    something else has come to `out` in the meantime.
    """
    with writing(out, MEND, needed):
        made = _missing(out)
        try:
            make_folder(out)
            with TemporaryDirectory(prefix=_STAGING, dir=out) as temporary:
                yield Path(temporary)
                if new and any(not path.name.startswith(_STAGING) for path in out.iterdir()):
                    raise LayershareError(f"Another command has written to '{out}' meanwhile; name another folder.")
                publish(Path(temporary), out)
        except BaseException:
            _remove_empty(made)
            raise


def publish(staging: Path, out: Path) -> None:
    """Give the files of a finished model their manifest and move them to `out`, `config.json` last.

    The manifest comes first: beside older files, among which these come, it tells that they are not a whole model.
    Older weights that would be read in place of these are deleted.
    """
    write_manifest(staging)
    order = {MANIFEST: 0, "config.json": 2}
    for number, file in enumerate(sorted(staging.iterdir(), key=lambda file: order.get(file.name, 1))):
        if (out / file.name).is_dir():
            shutil.rmtree(out / file.name)
        file.replace(out / file.name)
        if number == 0:
            for old in out.glob("model*.safetensors*"):
                if not (staging / old.name).exists():
                    old.unlink()


def _missing(folder: Path) -> list[Path]:
    """The folder and those around it that are not there."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # something else is there by now, such as another run
        for folder in folders:
            folder.rmdir()
