"""Describe a causal language model from its config alone: no weights, no per-family code."""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layershare.errors import UnsupportedModelError, quantized_with
from layershare.model.arch import PARTS, READERS, WRITERS, Linear, Spec, find_blocks
from layershare.model.checked import FLOATS, no_weights, quantized_by
from layershare.model.flow import Flow
from layershare.model.given import require_model
from layershare.model.prenorm import NotPreNorm, PreNorm, find_prenorm
from layershare.model.skeleton import run_skeleton

# Last part of a linear's name -> role. What attention and MLP both use, `role_of` tells apart by the parent.
_ROLE_NAMES = {
    "q": ("q_proj", "wq"),
    "k": ("k_proj", "wk"),
    "v": ("v_proj", "wv"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack"),
    "o": ("o_proj", "wo"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "fc1", "fc_in", "c_fc", "dense_h_to_4h"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h"),
}
_ROLE_OF_NAME = {name: role for role, names in _ROLE_NAMES.items() for name in names}


def role_of(name: str) -> str | None:
    """The role of a linear by its name, `None` if the name is not a known one.

    >>> role_of("layers.3.self_attn.q_proj"), role_of("h.0.mlp.c_proj"), role_of("h.0.attn.c_proj")
    ('q', 'down', 'o')
    """
    parent, _, last = name.rpartition(".")
    in_attention = re.search("att(n|ention)", parent) is not None
    if last == "c_proj":
        return "o" if in_attention else "down"
    if last in ("dense", "out_proj"):
        return "o" if in_attention else None
    return _ROLE_OF_NAME.get(last)


def describe(model: PreTrainedModel | PreTrainedConfig, dtype: torch.dtype | None = None) -> Spec:
    """Describe a model from its config alone: builds it without memory and runs its blocks once on shapes.

    Where its code looks at values, as with dynamic rotary positions, it runs on real tokens, with zeros for weights.
    Dtypes are those of the model if one is given; of a config, `dtype` or what it names. Raises
    `UnsupportedModelError`, with the reason, for models that are not dense decoders (encoder-decoder,
    mixture-of-experts, state-space and convolutional ones), and for already compressed models.
    """
    config = model if isinstance(model, PreTrainedConfig) else require_model(model, weights=False).config
    _refuse_config(config)
    try:
        skeleton, seen = run_skeleton(config, dtype or config.dtype or torch.float32, _watch)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a model's own code raises
        raise UnsupportedModelError(
            f"A '{config.model_type}' model of this config cannot be run on token ids alone ({type(error).__name__})."
        ) from error
    stack, blocks, flow, sites = seen
    tensors, counted = {}, set()
    for name, value in skeleton.state_dict(keep_vars=True).items():
        if id(value) not in counted:
            counted.add(id(value))
            tensors[name] = (tuple(value.shape), value.dtype)
    if isinstance(model, PreTrainedModel):
        real = model.state_dict()
        _require_same(model, real, skeleton)
        _require_floats(model)
        tensors = {name: (shape, real[name].dtype) for name, (shape, _) in tensors.items()}
    head = skeleton.get_output_embeddings()
    prefix = f"{skeleton.base_model_prefix}." if skeleton.base_model is not skeleton else ""
    linears = _linears(config.model_type, blocks, stack, sites)
    return Spec(
        model_type=config.model_type,
        base_prefix=prefix,
        blocks=stack,
        n_layers=len(blocks),
        linears=linears,
        tensors=tensors,
        buffers=frozenset(tensors) - {name for name, _ in skeleton.named_parameters()},
        head_multiplications=head.weight.numel() if isinstance(head, nn.Linear) else 0,
        prenorm=_prenorm(flow, prefix, linears, len(blocks), head),
    )


def _require_same(model: PreTrainedModel, real: Mapping[str, torch.Tensor], skeleton: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` if a model in memory is not the language model that its config makes."""
    expected = skeleton.state_dict()
    if other := sorted(real.keys() ^ expected.keys()):
        whose = "has" if other[0] in real else "lacks"
        raise UnsupportedModelError(
            f"This {type(model).__name__} is not the {type(skeleton).__name__} that its config makes, for it {whose} "
            f"'{other[0]}' ({len(other)} such tensors); give that model, as AutoModelForCausalLM loads it."
        )
    for name, tensor in real.items():
        if tensor.shape != expected[name].shape:
            raise UnsupportedModelError(
                f"'{name}' is {list(tensor.shape)} in memory, but {list(expected[name].shape)} by the model's config: "
                "its modules were changed after loading; give the model as it was loaded."
            )


def _require_floats(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` for weights in memory of a type that weights do not have."""
    for name, parameter in model.named_parameters():
        if parameter.dtype not in FLOATS:
            raise no_weights(name, parameter.dtype)


def _prenorm(
    flow: Flow, prefix: str, linears: Sequence[Linear], n_layers: int, head: nn.Module | None
) -> PreNorm | str:
    """The residual stream, or why it is not that of a plain pre-norm decoder."""
    parts = []
    for layer in range(n_layers):
        for part in PARTS:
            own = [linear for linear in linears if linear.layer == layer and linear.part == part]
            readers = [f"{prefix}{linear.name}" for linear in own if linear.role in READERS]
            writers = [f"{prefix}{linear.name}" for linear in own if linear.role in WRITERS]
            if not readers or len(writers) != 1:
                return f"its blocks do not each have an attention and an MLP whose linears are known ({part})"
            parts.append((readers, writers[0]))
    if head is None:
        return "it has no output head"
    try:
        return find_prenorm(flow, prefix, parts, head)
    except NotPreNorm as reason:
        return str(reason)


def _linears(kind: str, blocks: nn.ModuleList, stack: str, sites: dict[str, str]) -> tuple[Linear, ...]:
    """The linears that have a role and are called. Raises `UnsupportedModelError` if they are not a decoder's."""
    linears: dict[tuple[int, str], Linear] = {}
    for layer, block in enumerate(blocks):
        for name, module in block.named_modules(prefix=f"{stack}.{layer}"):
            role = role_of(name)
            if role is None or name not in sites or not isinstance(module, nn.Linear | Conv1D):
                continue
            if (layer, role) in linears:
                raise UnsupportedModelError(
                    f"A '{kind}' block has two linears of role {role}: '{linears[layer, role].name}' and '{name}'."
                )
            conv1d = isinstance(module, Conv1D)
            d_in, d_out = module.weight.shape if conv1d else module.weight.shape[::-1]
            bias = module.bias is not None
            linears[layer, role] = Linear(name, layer, role, sites[name], d_in, d_out, bias, conv1d)
    roles = {role for _, role in linears}
    if "down" not in roles or not roles & {"q", "qkv"}:
        raise UnsupportedModelError(
            f"The blocks of a '{kind}' model are not those of an attention decoder "
            f"(linear layers found by name: {', '.join(sorted(roles)) or 'none'})."
        )
    return tuple(linears.values())


def _refuse_config(config: PreTrainedConfig) -> None:
    kind = config.model_type
    method = quantized_by(config.name_or_path or "this model", vars(config))
    if method == "layershare":
        raise UnsupportedModelError("This model is already compressed by layershare; start from the original.")
    if method is not None:
        raise quantized_with(method)
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"'{kind}' is an encoder-decoder model; only decoder-only models are supported.")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(f"'{kind}' is not a causal language model that transformers can build.")
    if config.get_text_config(decoder=True) is not config:
        raise UnsupportedModelError(f"'{kind}' is a multimodal model; give its text model alone.")


def _refuse_blocks(kind: str, blocks: nn.ModuleList) -> None:
    for name, module in blocks.named_modules():
        if isinstance(module, nn.Conv1d):
            raise UnsupportedModelError(
                f"'{kind}' is a state-space or convolutional model ('{name}' is a convolution); "
                "only attention decoders are supported."
            )
        if name.rpartition(".")[2] == "experts":
            raise UnsupportedModelError(
                f"'{kind}' is a mixture-of-experts model ('{name}' holds the experts); only dense models are supported."
            )


def _watch(
    model: PreTrainedModel, mode: AbstractContextManager[object]
) -> tuple[str, nn.ModuleList, Flow, dict[str, str]]:
    """The stack of blocks of a model with its name, and what a forward in `mode` shows: the flow and the sites."""
    stack, blocks = find_blocks(model)
    _refuse_blocks(model.config.model_type, blocks)
    flow = Flow()
    with flow.watching(model):
        return stack, blocks, flow, _sites(model, blocks, stack, mode)


def _sites(
    model: PreTrainedModel, blocks: nn.ModuleList, stack: str, mode: AbstractContextManager[object]
) -> dict[str, str]:
    """Linear's name -> name of the first linear that is given the same tensor, by a forward in `mode`."""
    first_reader: dict[int, str] = {}
    alive: list[torch.Tensor] = []  # a freed tensor's id could be taken by another
    sites: dict[str, str] = {}

    def watch(name: str):
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            alive.append(args[0])
            sites[name] = first_reader.setdefault(id(args[0]), name)

        return hook

    for name, module in blocks.named_modules(prefix=stack):
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(watch(name))
    with mode, torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    return sites
