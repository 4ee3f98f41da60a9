"""What compression needs to know of a causal language model: its blocks, its linears, who reads what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershare.errors import LayershareError, UnsupportedModelError
from layershare.model.checked import FLOATS
from layershare.model.composition import Member
from layershare.model.prenorm import PreNorm

READERS = ("q", "k", "v", "qkv", "gate", "up", "gate_up")
"""Roles that read the residual stream; their natural shared side is the input."""
WRITERS = ("o", "down")
"""Roles that write the residual stream; their natural shared side is the output."""
ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
Part = Literal["attention", "mlp", "block"]
"""A part of a block that can be left out: one of its two sub-layers, or all of it."""
PARTS: tuple[Part, ...] = ("attention", "mlp")
"""The two sub-layers of a block."""


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block, y = xW + b with W of shape d_in × d_out.

    `name` is relative to the base model (`layers.0.self_attn.q_proj`); `site` is the name of the first linear of the
    block that reads the same input tensor, so linears with one site share one Gram matrix; `conv1d` says that the
    stored weight is d_in × d_out (transformers' `Conv1D`) and not d_out × d_in.
    """

    name: str
    layer: int
    role: str
    site: str
    d_in: int
    d_out: int
    bias: bool
    conv1d: bool

    @property
    def parameters(self) -> int:
        """Number of weights, without the bias."""
        return self.d_in * self.d_out

    @property
    def part(self) -> Part:
        """The sub-layer that it belongs to."""
        return part_of(self.role)

    @property
    def member(self) -> Member:
        """As a member of a composition."""
        return Member(self.name, self.d_in, self.d_out, self.conv1d)

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight as the model stores it as W: d_in × d_out, and the other way round."""
        return weight if self.conv1d else weight.T


@dataclass(frozen=True)
class Spec:
    """What compression needs to know of a model; made by `describe`.

    `base_prefix` leads from a name in the causal LM's state dict to one in the base model (`model.`), `blocks` names
    the stack of blocks relative to the base model, `tensors` has shape and dtype of every tensor that a checkpoint
    stores (tied ones once, under full names), `buffers` the names among them that are no parameters. `prenorm` tells
    how the hidden states are made and read if the model is a plain pre-norm decoder, and otherwise why it is none.
    """

    model_type: str
    base_prefix: str
    blocks: str
    n_layers: int
    linears: tuple[Linear, ...]
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    buffers: frozenset[str]
    head_multiplications: int
    prenorm: PreNorm | str

    @cached_property
    def parameters(self) -> int:
        """All parameters, embeddings included, tied ones counted once."""
        return sum(prod(shape) for name, (shape, _) in self.tensors.items() if name not in self.buffers)

    @cached_property
    def by_role(self) -> dict[str, tuple[Linear, ...]]:
        """Role -> its linears in layer order, roles in the order in which data flows through a block."""
        roles = [role for role in ROLES if any(linear.role == role for linear in self.linears)]
        return {role: tuple(x for x in self.linears if x.role == role) for role in roles}

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that this model has."""
        return tuple(self.by_role)

    @property
    def grouped_query(self) -> bool:
        """Whether several query heads share a key head (GQA), so that k and v are narrower than q."""
        first = {role: linears[0] for role, linears in self.by_role.items()}
        return "k" in first and "q" in first and first["k"].d_out < first["q"].d_out

    def block(self, layer: int) -> str:
        """The name of a block, relative to the base model."""
        return f"{self.blocks}.{layer}"

    def within(self, layer: int, name: str) -> str:
        """The name of a module or tensor of a block, relative to that block."""
        return name.removeprefix(f"{self.block(layer)}.")

    def linear(self, role: str, layer: int) -> Linear:
        """The linear of one role in one layer. Raises `KeyError` if that layer has none."""
        return self.by_place[role, layer]

    def require_role(self, role: str) -> None:
        """Raise `LayershareError` if the model does not have a role."""
        if role not in self.roles:
            raise LayershareError(f"A '{self.model_type}' model has no role '{role}'; it has {', '.join(self.roles)}.")

    @cached_property
    def by_place(self) -> dict[tuple[str, int], Linear]:
        """(role, layer) -> that linear."""
        return {(linear.role, linear.layer): linear for linear in self.linears}

    def stored_as(self, dtypes: Mapping[str, torch.dtype], other: torch.dtype | None) -> "Spec":
        """The same with the floating types that a checkpoint stores, by names with or without prefix, `other` else."""
        tensors = {}
        for name, (shape, dtype) in self.tensors.items():
            stored = dtypes.get(name, dtypes.get(name.removeprefix(self.base_prefix), other))
            tensors[name] = (shape, stored if dtype in FLOATS and stored in FLOATS else dtype)
        return replace(self, tensors=tensors)

    def weight_name(self, linear: Linear) -> str:
        """Full state-dict name of a linear's weight."""
        return f"{self.base_prefix}{linear.name}.weight"

    def sliceable(self) -> PreNorm:
        """The residual stream, if it can be sliced. Raises `UnsupportedModelError`, with the reason, if not."""
        if isinstance(self.prenorm, str):
            raise UnsupportedModelError(
                f"A '{self.model_type}' model cannot be sliced, because {self.prenorm}; "
                "slicing needs blocks x + attention(norm(x)), then x + mlp(norm(x)). Use another method."
            )
        return self.prenorm

    def part(self, layer: int, part: Part) -> tuple[Linear, ...]:
        """The linears of one sub-layer of a block, the one that writes into the residual stream last."""
        linears = (linear for linear in self.linears if linear.layer == layer and linear.part == part)
        return tuple(sorted(linears, key=lambda linear: linear.role in WRITERS))

    def part_tensors(self, layer: int, part: Part) -> list[str]:
        """Full names of the tensors of a sub-layer: all of the attention module, the linears of the MLP.

        (The MLP of some families is no module of its own; what there is besides its linears has no weights.)
        """
        names = [linear.name for linear in self.part(layer, part)]
        prefixes = [f"{common_parent(names)}."] if part == "attention" else [f"{name}." for name in names]
        full = tuple(f"{self.base_prefix}{prefix}" for prefix in prefixes)
        return [name for name in self.tensors if name.startswith(full)]

    def layer_of(self, name: str) -> int | None:
        """The block that a tensor of this full name belongs to, if it does."""
        stack = f"{self.base_prefix}{self.blocks}."
        return int(name[len(stack) :].partition(".")[0]) if name.startswith(stack) else None

    def renumbered(self, name: str, layer: int) -> str:
        """The full name of the same tensor in another block."""
        stack = f"{self.base_prefix}{self.blocks}."
        return f"{stack}{layer}.{name[len(stack) :].partition('.')[2]}"


def part_of(role: str) -> Part:
    """The sub-layer that a role belongs to."""
    return "attention" if role in ("q", "k", "v", "qkv", "o") else "mlp"


def common_parent(names: Sequence[str]) -> str:
    """The innermost module that holds all modules of these names.

    >>> common_parent(["layers.0.self_attn.q_proj", "layers.0.self_attn.o_proj"])
    'layers.0.self_attn'
    """
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*(name.split(".")[:-1] for name in names), strict=False))
    return ".".join(parts[0] for parts in shared)


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The stack of blocks: the longest outermost ModuleList of the base model, with its name relative to that.

    Raises UnsupportedModelError if there is none.
    """
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.base_model.named_modules():  # parents come before their children
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in stacks):
            stacks[name] = module
    if not stacks:
        raise UnsupportedModelError(f"{type(model).__name__} has no stack of blocks to share weights between.")
    return max(stacks.items(), key=lambda item: len(item[1]))
