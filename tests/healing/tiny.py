"""Tiny compressed folders to heal, and settings that heal them in a second."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from layershare.healing.heal import heal_folder
from layershare.healing.job import HealJob, prepare_healing
from layershare.healing.settings import Healing
from layershare.recipe import make_as, make_recipe
from layershare.run import run
from layershare.store import as_json
from tests.families import tiny_model


def compress_tiny(folder: Path, tokenizer: Any, words: list[str], family: str = "llama", **changes: Any) -> Path:
    """A tiny model in `folder/dense`, a text in `folder/text.txt`, and the model compressed in `folder/small`."""
    tiny_model(family).save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    (folder / "text.txt").write_text("\n".join(words))
    values = {
        "model": str(folder / "dense"),
        "method": "basis-sharing",
        "keep": 0.5,
        "of": "targets",
        "calibration": {"text": str(folder / "text.txt"), "blocks": 16, "length": 32},
    }
    run(make_recipe(values | changes), folder / "small")
    return folder / "small"


def settings(small: Path, **changes: Any) -> Healing:
    """Eight steps of four blocks of 16 tokens, in float32."""
    values = {
        "model": str(small),
        "text": text_for(small, 8),
        "optimizer": {"lr": 1e-2},
        "batch_size": 4,
        "precision": "float32",
        "log_every": 2,
        "save_every": 2,
    }
    return make_as(Healing, values | changes)


def text_for(small: Path, steps: int) -> dict[str, Any]:
    return {"text": str(small.parent / "text.txt"), "length": 16, "tokens": steps * 4 * 16, "held_out": 4}


def heal(small: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Heal with these settings; returns `healing` of the results."""
    healed = as_json(heal_folder(job(small, **changes), out))
    assert healed == results_of(out)["healing"]
    return healed


def job(small: Path, **changes: Any) -> HealJob:
    return prepare_healing(settings(small, **changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    """The names of the tensors that differ in bits; the folders hold the same ones, of the same dtype."""
    old, new = weights(before), weights(after)
    assert {name: (t.shape, t.dtype) for name, t in old.items()} == {
        name: (t.shape, t.dtype) for name, t in new.items()
    }
    return {name for name in old if not torch.equal(old[name], new[name])}


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))
