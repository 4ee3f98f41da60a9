"""Run a recipe in child processes that are killed at random points, until one finishes. Its arguments: recipe, output
of the interrupted runs, output of an uninterrupted one, number of kills, seed."""

import os
import random
import signal
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


def start(out: Path) -> int:
    """Fork a child that carries out the recipe; its process id."""
    child = os.fork()
    if child == 0:
        run(recipe, out)
        os._exit(0)
    return child


begin = time.monotonic()
assert os.waitpid(start(whole), 0)[1] == 0
duration = time.monotonic() - begin

# What shows that a child is in the middle of calibrating, of solving, of refitting, of writing.
signs = (".run/stats/*/inputs-001*", ".run/units/*.safetensors", ".run/refit/layer-001*", ".run/model/*.safetensors*")
seen = set()
for attempt in range(kills):
    child = start(interrupted)
    if attempt < len(signs):
        while not list(interrupted.glob(signs[attempt])) and os.waitpid(child, os.WNOHANG)[0] == 0:
            time.sleep(0.0005)
    else:
        time.sleep(chance.uniform(0.1, 0.9) * duration)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen |= {path.parent.name for path in interrupted.rglob("*.safetensors")}
    if (interrupted / "config.json").exists():
        break
assert os.waitpid(start(interrupted), 0)[1] == 0  # of a finished run it clears away what the kill left
print(" ".join(sorted(seen)))
