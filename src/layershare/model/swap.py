"""What `config.json` lists of a compressed model, and putting the modules that it names into a dense one and out again.

Module names are relative to the base model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layershare.errors import LayershareError, unknown
from layershare.model.arch import PARTS, Part, common_parent, find_blocks
from layershare.model.dropped import DroppedAttention, DroppedLinear, drop_mlp, zeroed
from layershare.model.layers import SIDES, ComposedLinear, DeltaLinear, FactorLinear, Side


@dataclass(frozen=True)
class Group:
    """Layers that share one basis, the owner first.

    Raises `LayershareError` for a side, rank or member list that cannot be.
    """

    role: str
    side: Side
    rank: int
    members: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise unknown("side", str(self.side), SIDES)
        object.__setattr__(self, "members", tuple(self.members))
        if not _are_names(self.members):
            raise LayershareError(f"A group of role '{self.role}' lists no member layers: repair its 'members'.")
        _check_rank(f"group of '{self.members[0]}'", self.rank)


@dataclass(frozen=True)
class Anchored:
    """Layers (`members`) that use the weight of `anchor`, each with a delta of its own; the anchor may be one of them.

    Raises `LayershareError` for a rank, anchor or member list that cannot be.
    """

    role: str
    rank: int
    anchor: str
    members: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(self.members))
        if not self.members or not _are_names(self.users):
            raise LayershareError(
                f"An entry of role '{self.role}' in 'deltas' lists no anchor or no members: repair them in config.json."
            )
        _check_rank(f"delta to '{self.anchor}'", self.rank)

    @property
    def users(self) -> tuple[str, ...]:
        """All layers that use the shared weight, the anchor among them."""
        return self.members if self.anchor in self.members else (self.anchor, *self.members)


@dataclass(frozen=True)
class Dropped:
    """A sub-layer that one block has lost; `members` are the names of its linears, the one that writes last.

    Raises `LayershareError` for a part or member list that cannot be.
    """

    part: Part
    members: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise unknown("part", str(self.part), PARTS)
        object.__setattr__(self, "members", tuple(self.members))
        if not _are_names(self.members):
            raise LayershareError(f"A dropped {self.part} lists no linear layers: repair its 'members'.")


def swap_modules(model: PreTrainedModel, groups: Sequence[Group], deltas: Sequence[Anchored] = ()) -> None:
    """Put `FactorLinear`s and `DeltaLinear`s in the place of layers that share: on a meta skeleton or a real model.

    Biases are kept; factors, bases and deltas are left uninitialised on the device and in the dtype of the dense
    weight. Raises `LayershareError`, with the model unchanged, for unknown or unfit layers and impossible ranks.
    """
    base = model.base_model
    modules = dict(base.named_modules())
    for group in groups:
        _check_group(group, modules)
    for anchored in deltas:
        _check_anchored(anchored, modules)
    for group in groups:
        owner = None
        for name in group.members:
            dense = modules[name]
            factored = FactorLinear(*_dims(dense), group.rank, side=group.side, owner=owner, **_like(dense))
            _put(base, name, factored)
            owner = owner or factored
    for anchored in deltas:
        dense = modules[anchored.anchor]
        rank = anchored.rank if anchored.anchor in anchored.members else 0
        anchor = DeltaLinear(*_dims(dense), rank, **_like(dense))
        _put(base, anchored.anchor, anchor)
        for name in anchored.members:
            if name != anchored.anchor:
                dense = modules[name]
                _put(base, name, DeltaLinear(*_dims(dense), anchored.rank, anchor=anchor, **_like(dense)))


def _like(dense: Any) -> dict[str, Any]:
    """How a layer in the place of this one has to be made."""
    place = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    return {"bias": dense.bias is not None, "conv1d": isinstance(dense, Conv1D), **place}


def _put(base: nn.Module, name: str, layer: ComposedLinear) -> None:
    """Put a layer in the place of a dense one, whose bias it takes over."""
    dense: Any = base.get_submodule(name)
    layer.bias = dense.bias
    base.set_submodule(name, layer.train(dense.training))


def drop_modules(model: PreTrainedModel, dropped: Sequence[Dropped]) -> None:
    """Put modules without weights in the place of the dropped sub-layers, in place.

    Raises `LayershareError`, with the model unchanged, for members that are no linears of the model.
    """
    base = model.base_model
    stack, _ = find_blocks(model)
    modules = dict(base.named_modules())
    linears = _linears(modules)
    for name in chain.from_iterable(each.members for each in dropped):
        if name not in linears:
            raise unknown("linear layer", name, linears)
    for each in dropped:
        if each.part == "attention":
            parent = common_parent(each.members)
            layer = int(parent.removeprefix(f"{stack}.").partition(".")[0])
            base.set_submodule(parent, DroppedAttention(modules[parent], layer))
        else:
            drop_mlp(base, each.members)


def make_dense(model: Any) -> None:
    """Replace all layers that share by ordinary ones that compute the same, in place; sub-layers come back as zeros.

    Raises `LayershareError`, with the model unchanged, where a part carries an adapter or is offloaded.
    """
    composed = {name: module for name, module in model.named_modules() if isinstance(module, ComposedLinear)}
    for module in composed.values():
        module.require_plain_parts()
    for name, module in composed.items():
        model.set_submodule(name, module.to_dense())
    _restore_dropped(model)


def _restore_dropped(model: Any) -> None:
    """Give dropped sub-layers back their dense modules, with zeros for weights, in place."""
    device = model.device
    missing = {name: module for name, module in model.named_modules() if isinstance(module, DroppedAttention)}
    if missing:
        with torch.device("meta"):
            skeleton = type(model)(model.config)
        for name in missing:
            model.set_submodule(name, zeroed(skeleton.get_submodule(name).to(model.dtype), device))
    for name, module in list(model.named_modules()):
        if isinstance(module, DroppedLinear):
            model.set_submodule(name, module.to_dense(device, model.dtype))


def _dims(dense: nn.Module) -> tuple[int, int]:
    """`(d_in, d_out)` of a dense layer."""
    assert isinstance(dense, nn.Linear | Conv1D)
    d_out, d_in = dense.weight.T.shape if isinstance(dense, Conv1D) else dense.weight.shape
    return d_in, d_out


def _linears(modules: dict[str, nn.Module]) -> set[str]:
    return {name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}


def _are_names(names: Sequence[Any]) -> bool:
    """Whether there are any names, and nothing else."""
    return bool(names) and all(isinstance(name, str) for name in names)


def _check_rank(what: str, rank: Any) -> None:
    if type(rank) is not int or rank < 1:
        raise LayershareError(f"The {what} has rank {rank!r}: give a whole number from 1 up.")


def _check_dense(names: Sequence[str], modules: dict[str, nn.Module]) -> list[tuple[int, int]]:
    """The `_dims` of layers that are to be replaced. Raises where they are not there, or not dense any more."""
    linears = _linears(modules)
    for name in names:
        if isinstance(modules.get(name), ComposedLinear):
            raise LayershareError(f"Layer '{name}' is compressed already: start from the original model.")
        if name not in linears:
            raise unknown("linear layer", name, linears)
    return [_dims(modules[name]) for name in names]


def _check_group(group: Group, modules: dict[str, nn.Module]) -> None:
    """Raise where `group` does not fit the model's `modules`."""
    dims = _check_dense(group.members, modules)
    shared, private = (0, 1) if group.side == "input" else (1, 0)
    if len({each[shared] for each in dims}) > 1:
        raise LayershareError(
            f"The members of the group of '{group.members[0]}' differ in their {group.side} width: they cannot share."
        )
    limit = min(dims[0][shared], sum(each[private] for each in dims))
    if group.rank > limit:
        raise LayershareError(
            f"The group of '{group.members[0]}' has rank {group.rank}: its matrices allow {limit} at most."
        )


def _check_anchored(anchored: Anchored, modules: dict[str, nn.Module]) -> None:
    """Raise where `anchored` does not fit the model's `modules`."""
    dims = _check_dense(anchored.users, modules)
    if len(set(dims)) > 1:
        raise LayershareError(f"The layers with deltas to '{anchored.anchor}' differ in shape: they cannot share.")
    if anchored.rank > min(dims[0]):
        raise LayershareError(
            f"The delta to '{anchored.anchor}' has rank {anchored.rank}: its matrices allow {min(dims[0])} at most."
        )
