"""Every recipe for healing that is shipped runs, on a tiny model of its kind and for two steps."""

from pathlib import Path

import pytest

from layershare.healing.heal import heal_folder
from layershare.healing.job import prepare_healing
from layershare.healing.settings import read_healing
from tests.healing.tiny import changed, compress_tiny

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "heal").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_run(recipe, small, shared, tmp_path, tokenizer, words):
    folder = {"delta": shared, "slicegpt": None}.get(recipe.stem, small)
    if folder is None:
        folder = compress_tiny(tmp_path, tokenizer, words, method="slicegpt", keep=0.8, of="all")
    text = str(folder.parent / "text.txt")
    tiny = {"text.text": text, "text.length": 16, "text.held_out": 2, "compile": False, "evaluation": None}
    settings = read_healing(recipe, {"model": str(folder)} | tiny)
    tokens = 2 * settings.batch_size * 16
    settings = read_healing(recipe, {"model": str(folder)} | tiny | {"text.tokens": tokens, "text.epochs": None})
    done = heal_folder(prepare_healing(settings), tmp_path / "out")
    held_out = [entry["held_out_loss"] for entry in done.log if "held_out_loss" in entry]
    assert len(held_out) == 3
    assert bool(changed(folder, tmp_path / "out")) == (min(held_out) < held_out[0])  # two steps need not help
