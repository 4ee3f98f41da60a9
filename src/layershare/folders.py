"""The folder of a run: what may be in it before, where work lies while it is unfinished, how it becomes a whole model.

While a run is unfinished, its output folder holds nothing but `.run`: the recipe, statistics, solved groups and the
checkpoint in the making. The finished files are moved out of it as the last step, `config.json` last of all, so that
the folder is a whole model or none.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from layershare.errors import LayershareError
from layershare.plan.table import size
from layershare.store import LOCK, only_one, write_atomically

WORK = ".run"
RECIPE = "recipe.yaml"
HEAL = "heal.yaml"
"""The recipe of a healing, beside which that of the compression lies."""


def is_finished(out: Path, recipe: str, name: str = RECIPE) -> bool:
    """Whether `out` holds the run of this very recipe, finished; `name` is that of the recipe's file.

    Raises `LayershareError` if it is a file, or holds something else than that run, finished or not.
    """
    if not require_folder(out).exists():
        return False
    names = [each for each in (HEAL, RECIPE) if (out / each).is_file()]
    finished = (out / "config.json").is_file() and names[:1] == [name]
    place = out if finished else out / WORK
    if (place / name).is_file():
        if (place / name).read_text(encoding="utf-8") == recipe:
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
    """The path, if a folder is there or can be. Raises `LayershareError` if it, or a part of it, is a file."""
    for part in (path, *path.parents):
        if part.is_file():
            raise LayershareError(f"'{part}' is a file; name a folder.")
    return path


def require_disk(needs: dict[Path, int]) -> None:
    """Raise `LayershareError` if there are fewer bytes free than needed for one of these folders."""
    for folder, needed in needs.items():
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        if needed > free:
            raise LayershareError(
                f"The run needs about {size(needed)} of disk in '{folder}', where {size(free)} are free; "
                "free some or name another folder."
            )


@contextmanager
def work_folder(out: Path, recipe: str, name: str = RECIPE) -> Iterator[Path]:
    """The folder in `out` for an unfinished run; `name` is that of its recipe's file.

    If the run fails before any work is finished, the folder is removed, and so are those around it that were made for
    it and hold nothing else. Raises `LayershareError` if it cannot be made, or if another process works in it.
    """
    work = out / WORK
    made = [path for path in (work, *work.parents) if not path.exists()]
    with only_one(work):
        write_atomically(work / name, recipe.encode())
        try:
            yield work
        except Exception:
            if made and not [*work.rglob("*.safetensors"), *work.glob("plan-*.json")]:  # no finished work to keep
                shutil.rmtree(work)
                with suppress(OSError):  # something else is there by now, such as another run
                    for folder in made[1:]:
                        folder.rmdir()
            raise


def publish(staging: Path, out: Path) -> None:
    """Move the finished files from the work folder to `out`, `config.json` last, then delete what is left of it."""
    for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(out / file.name)
    shutil.rmtree(out / WORK)
