"""A model that others made, checked before transformers sees it: its config, and what its weight files hold.

Whoever opens a model comes through here (`source.read_config`, `Weights.open`, `hub.load`), so that what is wrong with
one is the same sentence everywhere. Of weight files only headers are read.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import reduce
from math import isfinite, isnan
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict, str_to_torch_dtype
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils.hub import cached_file

from layershare.connection import asking_hub
from layershare.errors import LayershareError, UnsupportedModelError
from layershare.foreign import read_mapping, reading, require_file

AGAIN = "fetch or write it again"
MERGE = (
    "merge it into its model first (in Python: PeftModel.from_pretrained(model, adapter).merge_and_unload()"
    ".save_pretrained(folder))"
)
"""What to do with an adapter."""
LAYERS = 512
"""The most layers that a config may ask for; the deepest models have a quarter of that."""
ENTRIES = 100_000
"""The most values that a config may hold, against what would take minutes to read."""
LARGEST = 10**9
"""The largest width, count of heads, vocabulary or context."""
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
_LIMITS = {"num_hidden_layers": LAYERS, "max_position_embeddings": LARGEST, **dict.fromkeys(_SIZES, LARGEST)}
_EPS = ("_eps", "_epsilon")
_BASES = ("rope_theta", "rotary_emb_base", "rope_local_base_freq")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
FLOATS = frozenset({*_DTYPES.values(), torch.float64})
"""The types that weights have, unless they are quantized."""
_STORED = {**str_to_torch_dtype, "C64": torch.complex64}
_WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_NO_WEIGHTS = re.compile(r"(^|\.)(\w*inv_freq|masked_bias|attn\.bias|attention\.bias|causal_mask|position_ids)$")
"""Masks and tables that former versions of transformers stored with the weights."""
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_COUNTS = {"max_length", "min_length", "max_new_tokens", "min_new_tokens", "num_beams", "num_return_sequences", "top_k"}
_TOKENS = {"suppress_tokens", "begin_suppress_tokens"}
_RATES = {"temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"}
"""Settings of generation that are whole numbers, lists of tokens, and numbers from 0."""
_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_OTHER_HEADS = {
    *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
    *MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(),
    *MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values(),
}


def config_values(source: str) -> dict[str, Any]:
    """What the config.json of a folder or hub id says, fetched if need be.

    Raises `LayershareError` for what no language model's says, and for a folder with an adapter; `OSError` if the hub
    does not have the model, or cannot be reached.
    """
    for name in _ADAPTERS if Path(source).is_dir() else _ADAPTERS[:1]:
        if _find(source, name, fetch=True) is not None:
            raise LayershareError(f"'{source}' holds an adapter ({name}): {MERGE}, or delete it.")
    path = _find(source, "config.json", fetch=True) or Path(source) / "config.json"
    with reading(f"The config.json of '{source}'", AGAIN):
        values = read_mapping(path)
        _check_config(values)
        _check_sizes(values)
    quantized_by(source, values)
    return values


def _check_config(values: dict[str, Any]) -> None:
    kind, architectures = values.get("model_type"), values.get("architectures")
    if not isinstance(kind, str):
        raise ValueError(f'its model_type is {kind!r}, not the name of a family such as "llama"')
    if not isinstance(architectures, list | None) or not all(isinstance(each, str) for each in architectures or ()):
        raise ValueError("its architectures are not a list of names")
    for name in _OTHER_HEADS.intersection(architectures or ()):
        raise UnsupportedModelError(
            f"This is a {name}, no causal language model: what it was trained for would be lost; give a language model."
        )
    for key in ("dtype", "torch_dtype"):
        dtype = values.get(key)
        if dtype is not None and dtype not in [*_DTYPES, "float64"]:
            raise ValueError(f"its {key} is {dtype!r}, none of {', '.join(_DTYPES)}")
    code = values.get("auto_map", {})
    if not isinstance(code, dict) or not all(isinstance(each, str | list) for each in code.values()):
        raise ValueError("its auto_map does not name classes")
    quantization = values.get("quantization_config")
    notes = quantization.get("compression", {}) if isinstance(quantization, dict) else {}
    if not isinstance(notes, dict) or not isinstance(notes.get("model", ""), str):
        raise ValueError("its quantization_config has a `compression` that is not ours")
    if not isinstance(values.get("transformers_weights", ""), str | None):
        raise ValueError("its transformers_weights is no file's name")
    if values.get("is_encoder_decoder"):
        raise ValueError("it is that of an encoder-decoder model; only decoder-only models are supported")
    if (count := sum(1 for _ in _entries(values))) > ENTRIES:
        raise ValueError(f"it holds {count} values, which no model's does")
    for key, value in _entries(values):
        if isinstance(value, float) and (isnan(value) or (key is not None and not isfinite(value))):
            raise ValueError(f"its {key} is {value}" if key else f"it lists {value}")
        number = value if isinstance(value, int | float) else 1
        if key is not None and ((key.endswith(_EPS) and number < 0) or (key in _BASES and number <= 0)):
            raise ValueError(f"its {key} is {value}, which is too small")


def _check_sizes(values: dict[str, Any]) -> None:
    """Raise `ValueError` for sizes that cannot be, by their common names and those of the family."""
    kind = values["model_type"]
    own: Mapping[str, str] = CONFIG_MAPPING[kind].attribute_map if kind in CONFIG_MAPPING else {}
    for name, limit in _LIMITS.items():
        for key in {name, own.get(name, name)}:
            given = values.get(key)
            for value in given if isinstance(given, list) else [given]:  # some families have one per layer
                if value is not None and (type(value) is not int or not 1 <= value <= limit):
                    raise ValueError(f"its {key} is {value!r}, no number from 1 to {limit}")


def _entries(value: Any, key: str | None = None) -> Iterator[tuple[str | None, Any]]:
    """All values that a config holds, with their keys; without one in lists."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _entries(each, name)
    elif isinstance(value, list):
        for each in value:
            yield from _entries(each)
    else:
        yield key, value


def may_run_code(source: str, values: dict[str, Any], trust_remote_code: bool) -> bool:
    """Whether the code in a model's own files is to be run: never where transformers has the model's class itself.

    Raises `LayershareError` if it would have to be run without having been allowed.
    """
    kind, code = values["model_type"], values.get("auto_map") or {}
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if "AutoModelForCausalLM" in code else CONFIG_MAPPING
    if not code or (kind in CONFIG_MAPPING and kind in known):
        return False
    if not trust_remote_code:
        raise needs_trust(f"'{source}'")
    return True


def needs_trust(what: str) -> LayershareError:
    """The error for what only its own code can read, and no one has allowed that."""
    return LayershareError(
        f"{what} needs Python code that comes with it. If you have read that and trust it, allow it with "
        "--trust-remote-code, or `trust_remote_code: true` in a recipe."
    )


def quantized_by(source: str, values: dict[str, Any]) -> str | None:
    """The method that a model is quantized with, ours included; `None` if it is not.

    Raises `LayershareError` where the config says that it is, but not how.
    """
    quantization = values.get("quantization_config", values.get("compression_config"))
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is None and isinstance(quantization, dict):
        method = next(("bitsandbytes" for key in ("load_in_8bit", "load_in_4bit") if quantization.get(key)), None)
    if not isinstance(method, str):
        raise UnsupportedModelError(
            f"The quantization_config of '{source}' names no method that transformers knows (MLX writes such ones): "
            "start from the unquantized weights."
        )
    return method


def stored_tensors(source: str, values: dict[str, Any], *, fetch: bool = True) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by its name there, on the meta device; nothing for a config alone.

    Weights that are on the hub but not here are fetched, or passed over. Raises `LayershareError` for files that are
    damaged, lead out of the model's folder, or hold something else, and for fewer layers than the config asks for.
    """
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(source, values, fetch):
        with reading(f"The weight file '{path.name}' of '{source}'", AGAIN):
            tensors |= _tensors_of(require_file(path))
    for name, tensor in tensors.items():
        if tensor.is_complex():  # of no use to any model, unlike integers and bits of other sorts
            raise no_weights(name, tensor.dtype)
    kind = values["model_type"]
    own = CONFIG_MAPPING[kind].attribute_map if kind in CONFIG_MAPPING else {}
    wanted = values.get(own.get("num_hidden_layers", "num_hidden_layers"), values.get("num_hidden_layers"))
    numbers = [int(found[1]) for name in tensors if (found := re.search(r"(?:^|\.)(\d+)\.", name))]
    if numbers and isinstance(wanted, int) and wanted > max(numbers) + 1:
        raise LayershareError(
            f"The config.json of '{source}' asks for {wanted} layers, but its weights have {max(numbers) + 1}: "
            "config.json and weights are of different models."
        )
    return tensors


def _tensors_of(path: Path) -> dict[str, Tensor]:
    if not path.stat().st_size:
        raise ValueError("it is empty")
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            return {name: _empty(each.get_shape(), each.get_dtype()) for name, each in slices.items()}
    try:
        tensors = load_state_dict(path, map_location="meta")
    except UnpicklingError as error:
        raise ValueError("it is no file of plain tensors; it may hold code, of which nothing was run") from error
    for name, tensor in tensors.items() if isinstance(tensors, dict) else [(None, None)]:
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError("it holds something else than tensors by their names")
    return tensors


def _empty(shape: list[int], dtype: str) -> Tensor:
    """A tensor of that type, as safetensors names it, without memory."""
    if dtype not in _STORED:
        raise ValueError(f"it holds a tensor of the type {dtype}, which is no type of weights")
    return torch.empty(shape, dtype=_STORED[dtype], device="meta")


def _weight_files(source: str, values: dict[str, Any], fetch: bool) -> list[Path]:
    """The files that transformers will read."""
    own = values.get("transformers_weights")
    for name in [own] if own else _WHOLE:
        with reading(f"The '{name}' of '{source}'", AGAIN):
            path = _find(source, _within(name), fetch=fetch)
            if path is None:
                continue
            if not name.endswith(".index.json"):
                return [_inside(source, path)]
            return [_inside(source, _shard(source, file, fetch)) for file in _shards(path)]
    return []


def _shards(index: Path) -> list[str]:
    """The names of the files that an index lists."""
    values = read_mapping(index)
    files = values.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError("it has no weight_map that tells which file holds which tensor")
    for name, file in files.items():
        if not isinstance(file, str) or not file:
            raise ValueError(f"it names no file for '{name}'")
        _within(file)
    if not isinstance(values.get("metadata"), dict):
        raise ValueError("it has no metadata, which transformers needs")
    return list(dict.fromkeys(files.values()))


def _within(name: str) -> str:
    """The name of a file, if it leads to one in the model's folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"'{name}' is outside of the model's folder")
    return name


def _shard(source: str, file: str, fetch: bool) -> Path:
    path = _find(source, file, fetch=fetch)
    if path is None:
        raise ValueError(f"it names '{file}', which is not there")
    return path


def _inside(source: str, path: Path) -> Path:
    """The path, unless a link leads out of the model's folder. The hub's cache keeps contents in `blobs` beside it."""
    folder = Path(source) if Path(source).is_dir() else next(p for p in path.parents if p.parent.name == "snapshots")
    folder, real = folder.resolve(), path.resolve()
    blobs = folder.parent.parent / "blobs"
    if real.is_relative_to(folder) or (folder.parent.name == "snapshots" and real.is_relative_to(blobs)):
        return path
    raise ValueError(f"'{path.name}' leads out of the model's folder, to '{real}'; put the file itself there")


def _find(source: str, name: str, *, fetch: bool) -> Path | None:
    """A file of a folder, or of a model on the hub: fetched, or as far as it is in the cache; `None` if not there."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.exists() else None
    found: Any = try_to_load_from_cache(source, name)
    if found is None and fetch:  # neither there nor known to be missing
        needed = name == "config.json"  # others may be missing, and offline it is not known that they are
        with asking_hub():
            found = cached_file(
                source,
                name,
                _raise_exceptions_for_missing_entries=needed,
                _raise_exceptions_for_connection_errors=needed,
            )
    return Path(found) if isinstance(found, str) else None


def require_generation_config(source: str) -> None:
    """Raise `LayershareError` for a generation_config.json that transformers could not use once it generates."""
    path = _find(source, "generation_config.json", fetch=True)
    if path is None:
        return
    with reading(f"The generation_config.json of '{source}'", "repair or delete it"):
        values = read_mapping(path)
        for key, value in values.items():
            if not _fits(key, value):
                raise ValueError(f"its {key} is {value!r}")
        GenerationConfig(**values).validate()


def require_tokenizer_files(source: str) -> None:
    """Raise `LayershareError` for a tokenizer's file that is not of its kind; small ones are read, others looked at."""
    for name in ("tokenizer.json", "tokenizer.model", *_TOKENIZER):
        with reading(f"The {name} of '{source}'", AGAIN):
            path = _find(source, name, fetch=True)
            if path is not None and name in _TOKENIZER:
                read_mapping(path)
            elif path is not None:
                require_file(path)


def _fits(key: str, value: Any) -> bool:
    """Whether a value of a generation_config.json is of the type that its key has."""
    if value is None:
        return True
    if key.endswith("_token_id"):
        return all(type(each) is int for each in (value if isinstance(value, list) else [value]))
    if key in _TOKENS:
        return isinstance(value, list) and all(type(each) is int for each in value)
    if key in _COUNTS:
        return type(value) is int and value >= 0
    if key in _RATES:
        return type(value) in (int, float) and isfinite(value) and value >= 0
    return type(value) is bool if key in ("do_sample", "use_cache") else True


def main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype | None:
    """The floating type that most of a checkpoint's numbers have; `None` without any."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in FLOATS:
            counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0] if counts else None


def exact_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> torch.dtype:
    """The narrowest floating type that holds what `dtype` holds, and all numbers of a checkpoint as they are."""
    return reduce(torch.promote_types, (each.dtype for each in tensors.values() if each.dtype in FLOATS), dtype)


def require_all_used(source: str, unexpected: set[str]) -> None:
    """Raise `LayershareError` for weights of a checkpoint that the model made of it does not have."""
    if lost := {name for name in unexpected if not _NO_WEIGHTS.search(name)}:
        raise LayershareError(
            f"The checkpoint '{source}' has {len(lost)} tensors that its language model does not, among them "
            f"'{min(lost)[:100]}': they would be lost. Take such a head or adapter out, or repair config.json."
        )


def require_floating(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> None:
    """Raise `LayershareError` for a weight that is stored as integers, truth values or other than its model's type."""
    prefix, parameters = f"{model.base_model_prefix}.", dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        found = stored.get(name, stored.get(name.removeprefix(prefix)))
        weighs = name in parameters or tensor.is_floating_point()
        if found is not None and weighs and found.dtype not in FLOATS and found.numel():
            raise no_weights(name, found.dtype)


def no_weights(name: str, dtype: torch.dtype) -> UnsupportedModelError:
    """The error for weights that are integers, truth values or other than `FLOATS`."""
    kind = str(dtype).removeprefix("torch.")
    return UnsupportedModelError(f"'{name}' is of type {kind}, which weights are not; use the unquantized model.")
