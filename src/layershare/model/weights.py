"""Where a model's weights are: in memory, or left on disk and read when they are needed. One interface for both."""

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from accelerate.utils import PrefixedDataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershare.errors import LayershareError, mismatched
from layershare.memory import give_back_freed_memory
from layershare.model.arch import find_blocks
from layershare.model.source import read_model

# What a configuration records about files, versions and run-time choices rather than about the function computed.
_NOT_ARCHITECTURE = {
    *("architectures", "auto_map", "dtype", "id2label", "label2id", "output_attentions", "output_hidden_states"),
    *("quantization_config", "return_dict", "torch_dtype", "transformers_version", "use_cache"),
}
_Module = TypeVar("_Module", bound=nn.Module)
_SAMPLED = 256  # elements of each tensor that enter the fingerprint


class Weights:
    """A causal language model and its weights, whether they are in memory or on disk.

    `model` is the model itself: never modified, and on the meta device when its weights are on disk.
    `blocks` is its stack of blocks and `blocks_name` that stack's full name ("model.layers").
    `device` is where `block` and `shell` put what they read. `checkpoint` is what is stored on disk, by the names
    there, on the meta device: of other types than the model's, perhaps, in which it is read.
    """

    checkpoint: Mapping[str, Tensor] | None = None

    def __init__(self, model: PreTrainedModel, device: torch.device, stored: Mapping[str, Tensor] | None) -> None:
        """Use `Weights.of` or `Weights.open`; `stored` maps names to tensors on disk, None if all are in memory."""
        self.model = model
        self.device = device
        self._stored = stored
        name, self.blocks = find_blocks(model)
        self.blocks_name = name if model.base_model is model else f"{model.base_model_prefix}.{name}"

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Weights":
        """Wrap a model that is in memory."""
        return cls(model, model.device, None)

    @classmethod
    def open(
        cls,
        source: str | Path,
        scratch: Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
    ) -> "Weights":
        """Open a checkpoint (hub id or folder) and leave its weights on disk.

        Safetensors files are read where they are. What transformers has to convert, such as a PyTorch `.bin`
        checkpoint, is rewritten to the folder `scratch`, which must outlive this object.
        Raises LayershareError as `read_model`.
        """
        give_back_freed_memory()  # or what is read block after block would pile up
        scratch.mkdir(parents=True, exist_ok=True)
        place: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": scratch}
        model, checkpoint = read_model(source, trust_remote_code=trust_remote_code, dtype=dtype, **place)
        weights = cls(model, torch.device(device), _take_stored(model))
        weights.checkpoint = checkpoint
        return weights

    def names(self) -> list[str]:
        """Full names of all stored tensors (parameters and persistent buffers) in order; tied ones once."""
        tied = self.model.all_tied_weights_keys
        return [name for name in self.model.state_dict() if name not in tied]

    def tensor(self, name: str) -> Tensor:
        """The tensor of that full state-dict name, without gradient; from disk it is a lazily read memory map."""
        if self._stored is not None and name in self._stored:
            return self._stored[name]
        return self.model.get_parameter_or_buffer(name).detach()

    def combination(self, sources: Sequence[tuple[float, str]]) -> Tensor:
        """Σ cⱼ Tⱼ of tensors by their names, summed in float64, in the first one's dtype; a single one as it is."""
        (first, name), *others = sources
        tensor = self.tensor(name)
        if not others:
            return tensor
        total = first * tensor.double()
        for coefficient, name in others:
            total += coefficient * self.tensor(name).double()
        return total.to(tensor.dtype)

    def require_sound(self) -> None:
        """Raise LayershareError, naming the tensor, for NaN or infinity, and for what the config says otherwise.

        What is left on disk may have another shape than the config gives it; transformers does not compare them there.
        A config can say that two weights are tied while the checkpoint stores two different ones, and transformers then
        keeps both; counting and storing them once would change the model.
        """
        for name in self.names():
            stored, expected = self.tensor(name).shape, self.model.get_parameter_or_buffer(name).shape
            if stored != expected:
                raise mismatched(name, stored, expected)
        for name, source in self.model.all_tied_weights_keys.items():
            ours, theirs = self.tensor(name), self.tensor(source)
            both_known = not (ours.is_meta or theirs.is_meta)
            if both_known and ours.data_ptr() != theirs.data_ptr() and not torch.equal(ours, theirs):
                raise LayershareError(
                    f"The config ties '{name}' to '{source}', but the checkpoint stores two different tensors; "
                    "set tie_word_embeddings to false in its config.json."
                    if self._stored is not None
                    else f"The model's config ties '{name}' to '{source}', but in memory they are two different "
                    "tensors: set model.config.tie_word_embeddings = False, save the model and load it again."
                )
        require_finite((name, self.tensor(name)) for name in self.names())

    def block_name(self, index: int) -> str:
        """Full name of a block, for example "model.layers.3"."""
        return f"{self.blocks_name}.{index}"

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights on `device` for the duration of the context.

        In memory this is the model's own block. From disk it is a private copy that is emptied on exit, so whatever
        was done to it is undone.
        """
        if self._stored is None:
            yield self.blocks[index]
            return
        block = copy.deepcopy(self.blocks[index])
        # Copies, because a memory map could be read from disk again for every batch.
        weights = {
            name: self.tensor(f"{self.block_name(index)}.{name}").to(self.device, copy=True)
            for name in block.state_dict()
        }
        block.load_state_dict(weights, assign=True)
        del weights  # so that what is replaced in the block is freed
        block.to(self.device)
        try:
            yield block
        finally:
            block.to("meta")
            give_back_freed_memory()

    def whole(self) -> PreTrainedModel:
        """A copy of the model with all its weights on `device`, none of which requires a gradient.

        Its modules and parameters are its own to change; where the weights are in memory they share their storage.
        """
        own = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in self.model.parameters()}
        own |= {id(buffer): buffer for buffer in self.model.buffers()}
        model = copy.deepcopy(self.model, own)
        if self._stored is not None:
            state = {name: self.tensor(name).to(self.device, copy=True) for name in self.names()}
            model.load_state_dict(state, assign=True, strict=False)
            model.tie_weights()
            for name, buffer in model.named_buffers():
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, buffer.to(self.device))
        return model.requires_grad_(False)

    def shell(self, *, head: bool = False) -> PreTrainedModel:
        """A copy of the model for running what lies outside of the blocks; let go of it to free its memory.

        Its modules are its own, its tensors are the model's. Where those are on disk, everything but the blocks and,
        without `head`, the output head is loaded (on the CPU: memory-mapped, so an embedding costs only the rows that
        are looked up).
        """
        shell = twin(self.model).eval()
        if self._stored is None:
            return shell
        output = self.model.get_output_embeddings()
        skipped = set() if head or output is None else {id(tensor) for tensor in output.parameters()}
        skipped -= {id(tensor) for tensor in self.model.get_input_embeddings().parameters()}
        outside = {
            name: self.tensor(name).to(self.device)
            for name in self.names()
            if not name.startswith(f"{self.blocks_name}.")
            and id(self.model.get_parameter_or_buffer(name)) not in skipped
        }
        shell.load_state_dict(outside, assign=True, strict=False)
        if head:
            shell.tie_weights()
        for name, buffer in shell.named_buffers():
            owner, _, attribute = name.rpartition(".")
            setattr(shell.get_submodule(owner), attribute, buffer.to(self.device))
        return shell

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the architecture and, per tensor, name, shape, dtype and evenly spaced elements.

        The same for a model in memory and on disk. A few hundred elements of a tensor are read, so a model of any
        size takes seconds; a change confined to elements in between goes unnoticed.
        """
        digest = hashlib.sha256(json.dumps(_architecture(self.model.config.to_dict()), sort_keys=True).encode())
        for name in sorted(self.names()):
            tensor = self.tensor(name)
            sample = tensor.flatten()[:: tensor.numel() // _SAMPLED | 1].contiguous().cpu()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def twin(module: _Module) -> _Module:
    """A copy of a module whose modules are its own, while its tensors are the module's."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def require_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise LayershareError naming the first tensor with NaN or infinity.

    For a block: `require_finite(block.named_parameters(weights.block_name(i)))`.
    """
    for name, tensor in tensors:
        # The extremes carry NaN and infinity through without a mask of the tensor's size.
        if (
            tensor.is_floating_point()
            and tensor.itemsize > 1  # 8-bit floats, of quantized models, have no extremes
            and tensor.numel()
            and not torch.stack(tensor.aminmax()).isfinite().all()
        ):
            raise LayershareError(f"The weights of '{name}' contain NaN or infinity; use an intact checkpoint.")


def _take_stored(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Take the lazily read tensors, by full name, out of accelerate's hooks and strip the model of the hooks."""
    stored: Mapping[str, Tensor] = {}
    for module in model.modules():
        hook = vars(module).get("_hf_hook")
        for part in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
            if isinstance(part, AlignDevicesHook) and part.offload:
                # Each module's map is a view, by prefix, of the one map of the whole model.
                view = cast(PrefixedDataset, part.weights_map)
                stored = view.dataset
        remove_hook_from_module(module)
        vars(module).pop("forward", None)  # the hook's removal leaves the bound method behind
    vars(model).pop("hf_device_map")
    return stored


def _architecture(config: Any) -> Any:
    """A configuration as JSON values without what does not change the function computed."""
    if isinstance(config, dict):
        kept = {str(key): value for key, value in config.items() if key not in _NOT_ARCHITECTURE}
        return {key: _architecture(value) for key, value in kept.items() if not key.startswith("_")}
    if isinstance(config, (list, tuple)):
        return [_architecture(value) for value in config]
    return config if isinstance(config, (str, int, float, bool, type(None))) else str(config)
