"""Write a plan that was carried out as a Hugging Face folder."""

import copy
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from layershare.errors import LayershareError
from layershare.model.checked import main_dtype
from layershare.model.checkpoint import write_checkpoint
from layershare.model.depth import cut_layers
from layershare.model.hub import LayershareConfig, write_shim
from layershare.model.original import copy_side_files, located
from layershare.model.sliced import Sliced
from layershare.model.swap import Anchored, Dropped, Group
from layershare.model.weights import require_finite
from layershare.plan.edits import dropped_parts, kept_layers
from layershare.plan.layout import checkpoint_tensors, guard_of
from layershare.recipe import Recipe
from layershare.solve.apply import Factored, members
from layershare.store import write_atomically, write_json


def write_model(
    factored: Factored,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    original: Path | None = None,
) -> None:
    """Write the whole Hugging Face folder of a solved plan: weights, config, tokenizer, shim, plan and recipe.

    What belongs to the model beside them is copied from the `original`'s folder.
    """
    write_weights(factored, folder, recipe.max_shard_size)
    model, plan = factored.weights.model, factored.plan
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = _stored_dtype(factored, recipe)
    if model.is_remote_code():
        custom_object_save(model, folder, config)  # pyright: ignore[reportArgumentType]
    else:  # transformers' own class is the one that was changed
        vars(config).pop("auto_map", None)
    kept = kept_layers(factored.spec.n_layers, plan.edits)
    if len(kept) < factored.spec.n_layers:
        cut_layers(config, kept)
    groups, deltas = groups_of(factored), deltas_of(factored)
    dropped, sliced = dropped_of(factored), slice_of(factored)
    if sliced is not None:
        config.tie_word_embeddings = False
    ours = bool(groups or deltas or dropped) or sliced is not None
    if ours:
        notes = {
            "method": plan.method,
            "options": plan.options,
            "keep": plan.keep,
            "of": plan.of,
            "model": recipe.model,
        }
        config.quantization_config = LayershareConfig(groups, notes, deltas=deltas, dropped=dropped, slice=sliced)
    config.save_pretrained(folder)
    if ours and not model.is_remote_code():
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_shim(folder, values)
        write_json(folder / "config.json", values)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if original is not None:
        same = tokenizer is not None and located(tokenizer.name_or_path) in (recipe.model, str(original))
        copy_side_files(original, folder, vocabulary=same)
    write_atomically(folder / "plan.json", plan.to_json().encode())
    write_atomically(folder / "recipe.yaml", recipe.to_yaml().encode())


def _stored_dtype(factored: Factored, recipe: Recipe) -> torch.dtype:
    """The type in which the result says that it is to be run: as the original does, unless told to store another."""
    if recipe.store_dtype != "auto":
        return getattr(torch, recipe.store_dtype)
    checkpoint = factored.weights.checkpoint
    stored = None if recipe.dtype == "auto" or checkpoint is None else main_dtype(checkpoint)
    return stored or factored.weights.model.dtype


def write_weights(factored: Factored, folder: Path, max_shard_size: str | int = "5GB") -> None:
    """Write the compressed model's safetensors into `folder`. Raises `LayershareError` if a tensor is not finite."""
    tensors = checkpoint_tensors(factored.spec, factored.plan.edits)
    guard = guard_of(factored.spec, factored.plan.edits)

    def read(name: str) -> Tensor:
        if name == guard:
            return torch.zeros(0, dtype=torch.uint8)
        tensor = factored.tensor(name)
        require_finite([(name, tensor)])
        stored = tensor.to(tensors[name][1])
        if stored.dtype != tensor.dtype and not stored.isfinite().all():
            raise LayershareError(f"'{name}' does not fit {stored.dtype}; name a wider store_dtype.")
        return stored

    write_checkpoint(folder, tensors, read, max_shard_size)


def groups_of(factored: Factored) -> list[Group]:
    """The shares of a plan as the groups that the checkpoint's config lists."""
    return [
        Group(edit.role, edit.side, edit.rank, tuple(linear.name for linear in members(factored.spec, edit)))
        for edit in factored.shares
    ]


def deltas_of(factored: Factored) -> list[Anchored]:
    """The `Delta`s of a plan, as the checkpoint's config lists them."""
    spec, found = factored.spec, []
    for edit in factored.anchored:
        members = tuple(spec.linear(edit.role, layer).name for layer in edit.layers)
        found.append(Anchored(edit.role, edit.rank, spec.linear(edit.role, edit.anchor).name, members))
    return found


def dropped_of(factored: Factored) -> list[Dropped]:
    """The sub-layers that a plan leaves out, as the checkpoint's config lists them."""
    found = []
    for layer, part in dropped_parts(factored.plan.edits):
        found.append(Dropped(part, tuple(linear.name for linear in factored.spec.part(layer, part))))
    return found


def slice_of(factored: Factored) -> Sliced | None:
    """How a plan slices the model, as the checkpoint's config says it."""
    return None if factored.width is None else Sliced(factored.width, factored.spec.sliceable())
