"""Write a plan that was carried out as a Hugging Face folder."""

import copy
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layershare.model.checkpoint import write_checkpoint
from layershare.model.depth import cut_layers
from layershare.model.hub import LayershareConfig, write_shim
from layershare.model.weights import require_finite
from layershare.plan.edits import kept_layers
from layershare.plan.layout import checkpoint_tensors, listed
from layershare.recipe import Recipe
from layershare.solve.apply import Factored
from layershare.store import write_atomically, write_json


def write_model(factored: Factored, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write the whole Hugging Face folder of a solved plan: weights, config, tokenizer, shim, plan and recipe."""
    write_weights(factored, folder, recipe.max_shard_size)
    model, plan = factored.weights.model, factored.plan
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    kept = kept_layers(factored.spec.n_layers, plan.edits)
    if len(kept) < factored.spec.n_layers:
        cut_layers(config, kept)
    changes = listed(factored.spec, plan.edits)
    if changes["slice"] is not None:
        config.tie_word_embeddings = False
    ours = any(changes.values())
    if ours:
        notes = {
            "method": plan.method,
            "options": plan.options,
            "keep": plan.keep,
            "of": plan.of,
            "model": recipe.model,
        }
        config.quantization_config = LayershareConfig(compression=notes, **changes)
    config.save_pretrained(folder)
    if ours:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_shim(folder, values)
        write_json(folder / "config.json", values)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_atomically(folder / "plan.json", plan.to_json().encode())
    write_atomically(folder / "recipe.yaml", recipe.to_yaml().encode())


def write_weights(factored: Factored, folder: Path, max_shard_size: str | int = "5GB") -> None:
    """Write the compressed model's safetensors into `folder`. Raises `LayershareError` if a tensor is not finite."""
    tensors = checkpoint_tensors(factored.spec, factored.plan.edits)

    def read(name: str) -> Tensor:
        if tensors[name][0] == (0,):  # stands where only this package knows that a weight is gone
            return torch.zeros(0, dtype=torch.uint8)
        tensor = factored.tensor(name)
        require_finite([(name, tensor)])
        return tensor

    write_checkpoint(folder, tensors, read, max_shard_size)
