"""Compressed models as Hugging Face checkpoints: the one file that knows transformers' quantizer hooks.

A compressed folder is an ordinary one whose `config.json` has a `quantization_config` with our name. Because of it
transformers asks `LayershareQuantizer` to swap the modules of the empty skeleton and does the rest itself: shards,
dtypes, device maps, parallelism. Importing this module registers the quantizer, and our layers with PEFT;
`autoload.py` serves programs that do not import it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version as installed
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from layershare.autoload import when_imported
from layershare.errors import LayershareError, how_to_install, mismatched
from layershare.folders import staged
from layershare.foreign import reading
from layershare.formulas.quantize import read_scales
from layershare.model import adapters
from layershare.model.checked import AGAIN, FLOATS, main_dtype
from layershare.model.composition import Composition
from layershare.model.dropped import DroppedAttention, DroppedLinear
from layershare.model.given import require_model
from layershare.model.layers import ComposedLinear, QuantizedLinear
from layershare.model.parallel import adapt_sharding, adapt_tensor_plan
from layershare.model.sliced import Sliced, SlicedNorm, slice_modules
from layershare.model.source import read_model
from layershare.model.swap import Dropped, drop_modules, first_gone, make_dense, swap_modules
from layershare.model.weights import require_finite
from layershare.store import as_json

FORMAT_VERSION = 1
QUANT_METHOD = "layershare"
SHIM = "modeling_layershare"


class LayershareConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed model.

    `compositions`: `Composition`s or their JSON form; `dropped`: `Dropped`s likewise; `slice`: a `Sliced` likewise;
    `compression`: free notes for people (method, keep, ...). All, and whatever other tools add, are written again on a
    re-save.

    Raises `LayershareError` for a newer format or malformed entries.
    """

    def __init__(
        self,
        compositions: Iterable[Composition | dict[str, Any]] = (),
        compression: dict[str, Any] | None = None,
        version: int = FORMAT_VERSION,
        layershare_version: str | None = None,
        dropped: Iterable[Dropped | dict[str, Any]] = (),
        slice: Sliced | dict[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
        **more: Any,
    ) -> None:
        if type(version) is not int or version < 1:
            raise LayershareError(f"The quantization_config of config.json has version {version!r}: {AGAIN}.")
        if version > FORMAT_VERSION:
            raise LayershareError(
                f"This checkpoint has format version {version}, this layershare reads up to {FORMAT_VERSION}: "
                f"update it ({how_to_install()})."
            )
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue]  # the enum is closed
        self.version = version
        self.layershare_version = layershare_version or installed("layershare")
        with reading("The quantization_config of config.json", AGAIN):
            self.compositions = tuple(
                each if isinstance(each, Composition) else Composition.from_json(each) for each in compositions
            )
            self.dropped = tuple(each if isinstance(each, Dropped) else Dropped(**each) for each in dropped)
            self.slice = Sliced.from_json(slice) if isinstance(slice, dict) else slice
            self.compression = dict(compression or {})
        counts = Counter(chain.from_iterable(each.names for each in self.compositions))
        counts.update(chain.from_iterable(each.members for each in self.dropped))
        if twice := {name for name, count in counts.items() if count > 1}:
            raise LayershareError(f"'{min(twice)}' is listed twice: a layer belongs to one composition only.")
        self.__dict__.update(more)

    @property
    def guard(self) -> str | None:
        """The dense weight, relative to the base model, that is stored as a tensor of size zero; see `first_gone`."""
        return first_gone(self.compositions, self.dropped, self.slice)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, as it stands in `config.json`."""
        values = super().to_dict()
        values["compositions"] = [each.to_json() for each in self.compositions]
        del values["dropped"]
        if self.dropped:
            values["dropped"] = [{**asdict(each), "members": list(each.members)} for each in self.dropped]
        del values["slice"]
        if self.slice is not None:
            values["slice"] = as_json(asdict(self.slice))
        return values


class LayershareQuantizer(HfQuantizer):
    """What transformers calls while it loads, saves and densifies a compressed model."""

    requires_calibration = True  # a dense model cannot become one of ours through from_pretrained

    @property
    def edits(self) -> LayershareConfig:
        """What was done to the model."""
        return cast(LayershareConfig, self.quantization_config)

    @property
    def is_trainable(self) -> Any:
        """Factors are plain tensors: whatever can be done with weights can be done with them."""
        return True

    @property
    def is_qat_trainable(self) -> Any:
        """Without adapters, too."""
        return True

    @property
    def is_compileable(self) -> Any:
        """By torch.compile."""
        return True

    def is_serializable(self, *_: Any, **__: Any) -> Any:
        """Factors are plain tensors."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        drop_modules(model, self.edits.dropped)
        swap_modules(model, self.edits.compositions)
        if self.edits.slice is not None:
            slice_modules(model, self.edits.slice)
        _refuse_incomplete(model, checkpoint_files or ())
        adapt_sharding(model)
        if self.edits.guard is not None:
            model._keys_to_ignore_on_load_unexpected.add(re.escape(self.edits.guard) + "$")
        return model

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Adapt a tensor-parallel plan to the layers that share."""
        adapt_tensor_plan(model, plan)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> PreTrainedModel:
        # Factors are ordinary weights: casts and full fine-tuning, which quantized models refuse, are fine. (Saving
        # goes by `hf_quantizer`, not by this flag.)
        model.is_quantized = False
        # The shim's file is not copied on a re-save unless the model was loaded through it.
        auto_map = getattr(model.config, "auto_map", None) or {}
        if not model.is_remote_code() and auto_map.get("AutoModelForCausalLM", "").startswith(SHIM):
            del model.config.auto_map
        return model

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """The tensors to save: the model's and the guard."""
        state = model.state_dict()
        if self.edits.guard is not None:
            state[f"{_base_prefix(model)}{self.edits.guard}"] = torch.zeros(0, dtype=torch.uint8)
        return state, {}

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Make `model` an ordinary dense one in place; without `dtype` every layer keeps its own.

        Raises `LayershareError` for a sliced model, and where factors carry adapters.
        """
        if self.edits.slice is not None:
            raise LayershareError(
                "A sliced model has no dense equivalent: an ordinary model has no place for its shortcut matrices; "
                "use it as it is."
            )
        make_dense(model)
        self.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype)


register_quantization_config(QUANT_METHOD)(LayershareConfig)
register_quantizer(QUANT_METHOD)(LayershareQuantizer)
when_imported(adapters.RESOLVER, adapters.register)


def load(
    folder: str | Path, *, dense: bool = False, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """Load a causal LM, compressed or not, from a folder or hub id; `dense=True` multiplies the factors out.

    `options` go to `from_pretrained`. Raises `LayershareError` where there is no readable model, or only a part of one,
    or more in its files than the model has, for NaN and infinity in its weights, and where `verify` does.
    """
    model, _ = read_model(folder, trust_remote_code=trust_remote_code, **options)
    require_finite((name, tensor) for name, tensor in _numbers(model) if not tensor.is_meta)
    kinds = ComposedLinear | DroppedAttention | DroppedLinear | SlicedNorm
    ours = any(isinstance(module, kinds) for module in model.modules())
    return model.dequantize() if dense and ours else model


def _numbers(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters, and the scales of quantized ones, with their names."""
    yield from model.named_parameters()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield f"{name}.scales", read_scales(module.stored, module.storage, torch.float32)


def adopt(model: PreTrainedModel, config: LayershareConfig) -> None:
    """Make a model in memory whose modules are as `config` says look like a compressed one that was loaded."""
    vars(model).update(hf_quantizer=LayershareQuantizer(config), is_quantized=False)
    model.config.quantization_config = config


def save(model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """`save_pretrained` with the shim of `write_shim`, the tokenizer and a manifest for `verify`.

    All of it appears or nothing. Raises `LayershareError` if it cannot be written, and for a model that is wrapped,
    adapted, quantized or not in memory.
    """
    require_model(model)
    with staged(Path(folder), sum(each.nbytes for each in model.state_dict().values())) as staging:
        write_folder(model, staging, tokenizer)


def store_as(model: PreTrainedModel, checkpoint: Mapping[str, torch.Tensor], other: torch.dtype) -> None:
    """Give what is saved of a model the floating types that a checkpoint has, by name, and `other` to the rest."""
    prefix, tensors = _base_prefix(model), model.state_dict(keep_vars=True)
    types: dict[int, torch.dtype] = {}  # of tied tensors one may be stored
    for name, tensor in tensors.items():
        stored = checkpoint.get(name, checkpoint.get(name.removeprefix(prefix)))
        if stored is not None and stored.dtype in FLOATS:
            types[id(tensor)] = stored.dtype
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(types.get(id(tensor), other))


def write_folder(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None, max_shard_size: str = "5GB"
) -> None:
    """What `save` writes but the manifest."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["dtype"] = str(main_dtype(model.state_dict()) or model.dtype).removeprefix("torch.")
    if not model.is_remote_code():
        write_shim(folder, config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_shim(folder: str | Path, config: dict[str, Any]) -> None:
    """Write the module that `trust_remote_code=True` imports, and enter it in `config` (the content of config.json).

    It serves installations in which the autoload entry point is switched off.
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]
    code = (
        '"""Registers layershare, then hands over to transformers."""\n\n'
        "import layershare.model.hub  # noqa: F401\n"
        "import transformers\n\n\n"
        f"class {name}(transformers.{name}):\n"
        '    """The same class, from a module that imports layershare."""\n'
    )
    (Path(folder) / f"{SHIM}.py").write_text(code, "utf-8")
    config["auto_map"] = {"AutoModelForCausalLM": f"{SHIM}.{name}"}  # other code's files are not written


def _base_prefix(model: PreTrainedModel) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _refuse_incomplete(model: PreTrainedModel, files: Sequence[str]) -> None:
    """Raise where the safetensors `files` lack a tensor of a layer that shares, or of any layer of a sliced model, or
    hold it in another shape.

    transformers would initialise a missing one at random, with no more than a warning. Only headers are read.
    """
    shapes: dict[str, list[int]] = {}
    if not files or not all(path.endswith(".safetensors") for path in files):
        return
    for path in files:
        with safe_open(path, "pt") as file:
            shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  # not a mapping
    stored = {key.removeprefix(f"{model.base_model_prefix}."): shape for key, shape in shapes.items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    composed = tuple(f"{name}." for name, kind in kinds.items() if issubclass(kind, ComposedLinear))
    ours = ("",) if SlicedNorm in kinds.values() else composed
    saved = model.state_dict().keys()
    buffers = ((name, each) for name, each in model.named_buffers() if name.startswith(composed) and name in saved)
    for name, tensor in chain(model.named_parameters(), buffers):
        if not name.startswith(ours):
            continue
        key = name.removeprefix(_base_prefix(model))
        if key not in stored:
            raise LayershareError(f"The checkpoint lacks the tensor '{key}': fetch or write it again.")
        if stored[key] != list(tensor.shape):
            raise mismatched(key, stored[key], tensor.shape)
