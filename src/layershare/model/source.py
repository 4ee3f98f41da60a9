"""From a model's name to config and tokenizer. A name is a folder, a hub id, or `sample`, the model that we ship."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from layershare.autoload import METHOD
from layershare.connection import asking_hub
from layershare.errors import LayershareError, incomplete, mismatched, quantized_with, unknown
from layershare.foreign import reading
from layershare.manifest import require_whole
from layershare.model.arch import Spec
from layershare.model.checked import (
    AGAIN,
    FLOATS,
    config_values,
    main_dtype,
    may_run_code,
    needs_trust,
    quantized_by,
    require_all_used,
    require_floating,
    require_generation_config,
    require_tokenizer_files,
    stored_tensors,
)

SAMPLE = "sample"
_LOGGERS = (
    "transformers.modeling_utils",
    "transformers.distributed.tensor_parallel",  # asked by the former where that is hushed
    "accelerate.big_modeling",
)


def resolve(name: str | Path) -> str:
    """The folder or hub id that a name stands for.

    Raises `LayershareError` if it is a folder without a model, or one that has changed since it was written (weights
    are checked when they are opened), or a path that does not exist.
    """
    if str(name) == SAMPLE:
        if (Path(SAMPLE) / "config.json").exists():
            raise LayershareError(
                f"'{SAMPLE}' is the model that comes with layershare, and a folder here, too: write ./{SAMPLE} for "
                "that, or go to another folder."
            )
        return str(files("layershare") / "sample")
    path = Path(name)
    with reading(f"The model's name '{str(name)[:60]}…'", "name a folder or a hub id"):  # too long for a path, say
        path.exists()
    if path.is_dir():
        if not any((path / file).exists() for file in ("config.json", "adapter_config.json")):
            raise LayershareError(f"The folder '{name}' is not a model: it has no config.json.")
        require_whole(path, weights=False)
        return str(path)
    if path.is_file():
        raise LayershareError(f"'{name}' is a file; name the folder of a model, or a hub id.")
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise LayershareError(f"There is no model folder '{name}'.")
    return str(name)


def read_config(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's config. Raises `LayershareError` if there is no such model, or if `checked` refuses it."""
    source = resolve(name)
    values = values_of(source)
    run_code = may_run_code(source, values, trust_remote_code)
    with reading(f"The config.json of '{name}'", AGAIN), asking_hub(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=run_code)
        if run_code:  # so that the model's class is known wherever its config is
            model = get_class_from_dynamic_module(values["auto_map"]["AutoModelForCausalLM"], source)
            model.register_for_auto_class("AutoModelForCausalLM")
            AutoModelForCausalLM.register(type(config), model, exist_ok=True)
    return config


def stored_types(source: str, config: PreTrainedConfig) -> tuple[dict[str, Tensor], torch.dtype]:
    """What a checkpoint stores (on meta), and the floating type of its model: as its config says, or most of it has."""
    stored, own = stored_tensors(source, values_of(source)), config.dtype
    return stored, own if isinstance(own, torch.dtype) else main_dtype(stored) or torch.float32


def values_of(source: str) -> dict[str, Any]:
    """What the config.json of a folder or hub id says. Raises `LayershareError` as `read_config`."""
    try:
        return config_values(source)
    except (OSError, HFValidationError) as error:
        nearby = [SAMPLE, *(path.parent.name for path in Path().glob("*/config.json"))]
        hint = str(unknown("model", source, nearby)).removesuffix(f"Known: {', '.join(sorted(nearby))}.")
        raise LayershareError(
            f"{hint.strip()} It is no folder here, and the hub does not have it or cannot be reached."
        ) from error


def read_model(
    name: str | Path, *, trust_remote_code: bool = False, **options: Any
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The causal LM as `from_pretrained` gives it with these options, and what its checkpoint stores (on meta).

    Raises `LayershareError` as `read_config`, and if the weights cannot be read, lack some of the model's, or hold more
    than the model has, which would be lost.
    """
    source = resolve(name)
    require_whole(source, weights=True)
    values = values_of(source)
    stored = stored_tensors(source, values)
    if not stored:
        raise LayershareError(f"'{name}' has no weights (model.safetensors or pytorch_model.bin); {AGAIN}.")
    require_generation_config(source)
    method = quantized_by(source, values)
    foreign = method if method != METHOD else None
    run_code = may_run_code(source, values, trust_remote_code)
    try:
        with reading(f"The model '{name}'", AGAIN), _hushed(), asking_hub(source):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=run_code,
                **options,
            )
    except LayershareError as error:
        if foreign is None:
            raise
        raise quantized_with(foreign, error.__cause__) from error
    model, loading = loaded
    for key, there, here in loading["mismatched_keys"]:
        raise mismatched(key, there, here)
    if missing := loading["missing_keys"]:  # transformers makes them up
        raise incomplete(name, missing)
    require_all_used(source, loading["unexpected_keys"])
    if foreign is None:
        require_floating(model, stored)
    elif getattr(model, "hf_quantizer", None) is None:
        raise quantized_with(foreign)
    if not run_code:
        vars(model.config).pop("auto_map", None)  # it names files that are not written with the model
    return model, stored


def require_same_model(source: str, spec: Spec, stored: Mapping[str, Tensor]) -> None:
    """Raise `LayershareError` if a checkpoint has other shapes than the model of its config, or more layers."""
    for name, (shape, _) in spec.tensors.items():
        found = stored.get(name, stored.get(name.removeprefix(spec.base_prefix)))
        if found is not None and found.dtype in FLOATS and found.shape != torch.Size(shape):
            raise mismatched(name, found.shape, shape)
    layers = {name: (spec.layer_of(name), spec.layer_of(f"{spec.base_prefix}{name}")) for name in stored}
    require_all_used(source, {name for name, found in layers.items() if any((n or 0) >= spec.n_layers for n in found)})


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep libraries from printing what `read_model` makes sentences of, and that weights are on disk."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def read_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises `LayershareError` if it has none, and as `read_config`."""
    source = resolve(name)
    values_of(source)
    require_tokenizer_files(source)
    with reading(f"The tokenizer of '{name}'", AGAIN), asking_hub(source):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise needs_trust(f"The tokenizer of '{name}'") from error
        if not isinstance(tokenizer.model_max_length, int | float):
            raise ValueError(f"its model_max_length is {tokenizer.model_max_length!r}")
    if tokenizer._auto_class is None:
        tokenizer.init_kwargs.pop("auto_map", None)  # it names files that are not written with the tokenizer
    return tokenizer


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer of a model in memory, by the name that it was loaded by. Raises `LayershareError` without one."""
    name = model.name_or_path
    if not name or (Path(name).is_absolute() and not Path(name).exists()):
        raise LayershareError("This model was not loaded by a name, so its tokenizer is not known; give it, too.")
    return read_tokenizer(name)
