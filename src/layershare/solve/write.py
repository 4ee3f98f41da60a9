"""Write a plan that was carried out as a Hugging Face folder."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from layershare.errors import LayershareError
from layershare.model.checked import exact_dtype, main_dtype
from layershare.model.checkpoint import write_checkpoint
from layershare.model.depth import cut_layers
from layershare.model.hub import LayershareConfig, write_shim
from layershare.model.original import copy_side_files, located
from layershare.model.source import read_config
from layershare.model.weights import Weights, require_finite
from layershare.plan.edits import kept_layers
from layershare.plan.layout import checkpoint_tensors, listed
from layershare.recipe import Recipe
from layershare.solve.apply import Factored
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
    with _unrounded(factored, recipe, folder) as exact:
        write_weights(exact, folder, recipe.max_shard_size)
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


@contextmanager
def _unrounded(factored: Factored, recipe: Recipe, scratch: Path) -> Iterator[Factored]:
    """The same, with what it leaves alone as the checkpoint has it where the model is run in a type that rounds it."""
    weights = factored.weights
    dtype = exact_dtype(weights.checkpoint or {}, weights.model.dtype)
    if dtype == weights.model.dtype:
        yield factored
        return
    with TemporaryDirectory(prefix="scratch-", dir=scratch) as folder:
        exact = factored.branch()
        trust = recipe.trust_remote_code
        exact.weights = Weights.open(recipe.model, Path(folder), dtype=dtype, trust_remote_code=trust)
        yield exact


def _stored_dtype(factored: Factored, recipe: Recipe) -> torch.dtype:
    """The type in which the result says that it is to be run: as the original does, unless told to store another."""
    if recipe.store_dtype != "auto":
        return getattr(torch, recipe.store_dtype)
    model, checkpoint = factored.weights.model, factored.weights.checkpoint
    if checkpoint is None:
        return model.dtype
    own = read_config(recipe.model, trust_remote_code=recipe.trust_remote_code).dtype
    return own if isinstance(own, torch.dtype) else main_dtype(checkpoint) or model.dtype


def write_weights(factored: Factored, folder: Path, max_shard_size: str | int = "5GB") -> None:
    """Write the compressed model's safetensors into `folder`. Raises `LayershareError` if a tensor is not finite."""
    tensors = checkpoint_tensors(factored.spec, factored.plan.edits)

    def read(name: str) -> Tensor:
        if tensors[name][0] == (0,):  # stands where only this package knows that a weight is gone
            return torch.zeros(0, dtype=torch.uint8)
        tensor = factored.tensor(name)
        require_finite([(name, tensor)])
        stored = tensor.to(tensors[name][1])
        if stored.dtype != tensor.dtype and not stored.isfinite().all():
            raise LayershareError(f"'{name}' does not fit {stored.dtype}; name a wider store_dtype.")
        return stored

    write_checkpoint(folder, tensors, read, max_shard_size)
