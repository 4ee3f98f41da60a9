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
from layershare.model.composition import Composition, Member
from layershare.model.dropped import DroppedAttention, DroppedLinear, drop_mlp, zeroed
from layershare.model.layers import ComposedLinear
from layershare.model.sliced import Sliced


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


def first_gone(compositions: Sequence[Composition], dropped: Sequence[Dropped], slice: Sliced | None) -> str | None:
    """The first dense weight that is gone, relative to the base model: a tensor of size zero is stored in its place.

    A load without this package finds a weight of the wrong shape and fails, instead of finding none and initialising
    the compressed layers at random. `None` if nothing is gone.
    """
    gone = [each.names[0] for each in compositions] + [each.members[0] for each in dropped]
    if slice is not None:
        gone.append(slice.stream.sublayers[0].norm)
    return f"{gone[0]}.weight" if gone else None


def member_of(name: str, dense: nn.Module) -> Member:
    """A dense layer as a member of a composition."""
    assert isinstance(dense, nn.Linear | Conv1D)
    conv1d = isinstance(dense, Conv1D)
    d_in, d_out = dense.weight.shape if conv1d else dense.weight.T.shape
    return Member(name, d_in, d_out, conv1d)


def swap_modules(model: PreTrainedModel, compositions: Sequence[Composition]) -> None:
    """Put `ComposedLinear`s in the place of their members: on a meta skeleton or a real model.

    Biases are kept; factors are left uninitialised on the device and in the dtype of the dense weight. Raises
    `LayershareError`, with the model unchanged, for layers that are unknown, of another shape, or composed already.
    """
    base = model.base_model
    modules = dict(base.named_modules())
    for member in chain.from_iterable(each.members for each in compositions):
        _check_dense(member, modules)
    for composition in compositions:
        home = None
        for name in composition.names:
            dense: Any = modules[name]
            place = {"device": dense.weight.device, "dtype": dense.weight.dtype}
            layer = ComposedLinear(composition, name, False, home=home, **place)
            layer.bias = dense.bias
            base.set_submodule(name, layer.train(dense.training))
            home = home or layer


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


def _linears(modules: dict[str, nn.Module]) -> set[str]:
    return {name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}


def _are_names(names: Sequence[Any]) -> bool:
    """Whether there are any names, and nothing else."""
    return bool(names) and all(isinstance(name, str) for name in names)


def _check_dense(member: Member, modules: dict[str, nn.Module]) -> None:
    """Raise where a layer that is to be replaced is not there, not dense any more, or another one."""
    dense, linears = modules.get(member.name), _linears(modules)
    if isinstance(dense, ComposedLinear):
        raise LayershareError(f"Layer '{member.name}' is compressed already: start from the original model.")
    if dense is None or member.name not in linears:
        raise unknown("linear layer", member.name, linears)
    if (found := member_of(member.name, dense)) != member:
        raise LayershareError(
            f"'{member.name}' is {found.d_in} × {found.d_out} in this model, but {member.d_in} × {member.d_out} in its "
            "composition: they are of different models."
        )
