"""Run a recipe in child processes that are killed at random points, until one finishes. Its arguments: recipe, output
of the interrupted runs, output of an uninterrupted one, number of kills, seed."""

import glob
import multiprocessing
import random
import sys
import time
from pathlib import Path

import torch

from layershare.recipe import read_recipe
from layershare.run import run

torch.set_num_threads(1)
recipe = read_recipe(sys.argv[1])
interrupted, whole, kills = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
chance = random.Random(int(sys.argv[5]))
forks = multiprocessing.get_context("fork")


def finish(out: Path) -> None:
    """Carry out the recipe in a child process that nothing stops."""
    child = forks.Process(target=run, args=(recipe, out))
    child.start()
    child.join()
    assert child.exitcode == 0


begin = time.monotonic()
finish(whole)
duration = time.monotonic() - begin

# What shows that a child is in the middle of calibrating, of solving, of refitting, of writing.
measured = "gradients" if recipe.method == "auto" else "inputs"
signs = (
    f".run/stats/*/{measured}-001*",
    ".run/units/*.safetensors",
    ".run/**/refit/layer-001*",
    ".run/model/*.safetensors*",
)
seen = set()
for attempt in range(kills):
    child = forks.Process(target=run, args=(recipe, interrupted))
    child.start()
    if attempt < len(signs):
        # The child moves and deletes folders meanwhile: glob.glob passes over what is gone, Path.glob raises.
        while not glob.glob(signs[attempt], root_dir=interrupted, recursive=True) and child.is_alive():
            time.sleep(0.0005)
    else:
        time.sleep(chance.uniform(0.1, 0.9) * duration)
    child.kill()
    child.join()
    seen |= {path.parent.name for path in interrupted.rglob("*.safetensors")}
    if (interrupted / "config.json").exists():
        break
finish(interrupted)  # of a finished run it clears away what the kill left
print(" ".join(sorted(seen)))
