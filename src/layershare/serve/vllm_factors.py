"""What a vLLM process holds of the factors of a model: each once, cut to its part, and multiplied as vLLM multiplies.

A tensor-parallel process holds its rows of a layer's outputs, or its columns of the inputs: of a product that cuts the
last factor or the first.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader import get_model_loader

from layershare.errors import LayershareError, mismatched
from layershare.formulas.quantize import dense_weight
from layershare.model.composition import Factor, Member
from layershare.model.layers import unpivoted

Ranges = tuple[tuple[int, int], ...]
"""Which of a layer's inputs or outputs a process holds, as (begin, end)."""


@dataclass(frozen=True)
class Key:
    """A factor as a process holds it: who registers it, its name, what of inputs and outputs is kept (None: all)."""

    home: str
    name: str
    inward: Ranges | None
    outward: Ranges | None


@dataclass
class Held:
    """What a process holds of a factor, while it is loaded: the tensors by their names in the checkpoint.

    `dtype`: the floating one that it multiplies in, known with the first tensor.
    """

    key: Key
    factor: Factor
    member: Member
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def pivoted(self) -> bool:
        """Whether it is multiplied in pivoted form, which has no rows and columns to hold some of."""
        return self.factor.pivots is not None and self.key.inward is None and self.key.outward is None

    def take(self, name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
        """Keep the process's part of a tensor. Raises `LayershareError` if it has another shape than its factor."""
        shape, _ = self.factor.tensors(self.member)[name]
        if tensor.shape != torch.Size(shape):
            raise mismatched(f"{self.key.home}.{name}", tensor.shape, shape)
        if self._is_the_weight:
            tensor = self._cut(tensor)
        self.dtype = like.dtype
        dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
        self.tensors[name] = tensor.to(like.device, dtype, copy=True)

    def finish(self) -> torch.Tensor:
        """The matrix to multiply with, `[out, in]`; of a pivoted one T. Raises `LayershareError` without a tensor."""
        for name in self.factor.keys:
            if name not in self.tensors:
                raise LayershareError(
                    f"The checkpoint lacks the tensor '{self.key.home}.{name}': fetch or write it again."
                )
        storage = self.factor.storage
        if storage is None:
            weight = self.tensors.pop(self.factor.keys[0])
        else:
            rows, columns = self.factor.shape(self.member)
            stored = {key: self.tensors.pop(f"{self.factor.name}.{key}") for key in storage.tensors(rows, columns)}
            weight = dense_weight(stored, storage, columns, self.dtype)
        if self._is_the_weight or self.pivoted:
            return weight
        if self.factor.pivots:
            weight = unpivoted(weight, self.tensors[self.factor.order], self.factor.pivots)
        return self._cut(weight)

    @property
    def _is_the_weight(self) -> bool:
        """Whether its first tensor is what it multiplies with, or a part of that."""
        return self.factor.pivots is None and self.factor.storage is None

    def _cut(self, weight: torch.Tensor) -> torch.Tensor:
        for dim, ranges in enumerate((self.key.outward, self.key.inward)):
            if ranges is not None:
                weight = torch.cat([weight.narrow(dim, begin, end - begin) for begin, end in ranges], dim)
        return weight


class Part(nn.Module):
    """A matrix, multiplied with as vLLM multiplies with any dense one on its platform."""

    def __init__(self, weight: torch.Tensor, method: UnquantizedLinearMethod) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._method = method
        method.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        return self._method.apply(self, x)


class PivotedPart(Part):
    """P[1; T] or its transpose; see `composition`."""

    order: torch.Tensor

    def __init__(self, weight: torch.Tensor, method: UnquantizedLinearMethod, held: Held) -> None:
        self.side, (rows, columns) = held.factor.pivots, weight.shape
        super().__init__(weight, method)
        self.rank = rows if self.side == "input" else columns
        self.register_buffer("order", held.tensors[held.factor.order], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        if self.side == "output":
            return torch.cat((x, super().forward(x)), -1).index_select(-1, self.order)
        x = x.index_select(-1, self.order)
        return x[..., : self.rank] + super().forward(x[..., self.rank :])


class Store:
    """All factors that a process holds, each once, and which of them are multiplied as one matrix."""

    def __init__(self) -> None:
        self._held: dict[Key, Held] = {}
        self._loaded: dict[tuple[str, str], list[Held]] = defaultdict(list)
        self._here: set[str] = set()
        self._readers: dict[Key, set[tuple[Key, ...]]] = defaultdict(set)
        self.parts: dict[tuple[Key, ...], Part] = {}
        """What multiplies, by the factors that it is."""

    def hold(self, key: Key, factor: Factor, member: Member) -> None:
        """Note that a factor is needed."""
        if key not in self._held:
            self._held[key] = Held(key, factor, member)
            self._loaded[key.home, factor.name].append(self._held[key])

    def loaded(self, home: str, factor: Factor) -> list[Held]:
        """What is held of a factor that a layer here registers, however it is cut; grows as layers are made."""
        self._here.add(home)
        return self._loaded[home, factor.name]

    def fetch(self, like: torch.Tensor) -> None:
        """Read, when all layers are made, what is registered by layers on other stages of a pipeline."""
        away = {
            f"{home}.{name}": (name, helds)
            for (home, _), helds in self._loaded.items()
            if home not in self._here
            for name in helds[0].factor.keys
        }
        self._here.update(home for home, _ in self._loaded)
        for found, tensor in _read(away) if away else ():
            name, helds = away[found]
            for held in helds:
                held.take(name, tensor, like)

    def read_by_one(self, keys: tuple[Key, ...]) -> None:
        """Note that these are what meets one layer's input."""
        for key in keys:
            self._readers[key].add(keys)

    def joined(self, keys: Iterable[Key]) -> list[tuple[Key, ...]]:
        """Those of these factors that can be one matrix, because no other layer reads with some of them alone."""
        together, alone = [], []
        for key in keys:
            free = len(self._readers[key]) == 1 and not self._held[key].pivoted
            (together if free else alone).append(key)
        return [each for each in (tuple(together), *((key,) for key in alone)) if each]

    def width(self, key: Key) -> int:
        """How many numbers a factor that is held makes."""
        if key.outward is not None:
            return sum(end - begin for begin, end in key.outward)
        held = self._held[key]
        return held.member.d_out if held.factor.outward is None else held.factor.outward

    def part(self, keys: tuple[Key, ...], method: UnquantizedLinearMethod) -> Part:
        """The matrix that these are, one below the other: made once."""
        if keys not in self.parts:
            weights = [self._held[key].finish() for key in keys]
            held = self._held[keys[0]]
            if held.pivoted:
                self.parts[keys] = PivotedPart(weights[0], method, held)
            else:
                self.parts[keys] = Part(weights[0] if len(weights) == 1 else torch.cat(weights), method)
        return self.parts[keys]


def known(name: str, names: Container[str]) -> str | None:
    """The one of these names, relative to the base model, that a name in a checkpoint or vLLM's model stands for."""
    while name and name not in names:
        name = name.partition(".")[2]
    return name or None


def _read(names: Container[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of these names in the checkpoint, as vLLM reads it; files without any are left out."""
    config = get_current_vllm_config()
    wanted: Any = SimpleNamespace(is_unused_checkpoint_weight=lambda name: known(name, names) is None)
    for name, tensor in get_model_loader(config.load_config).get_all_weights(config.model_config, wanted):
        if found := known(name, names):
            yield found, tensor
