"""A linear layer of vLLM's as sums of products of factors.

vLLM fuses linears that read the same (q, k, v; gate, up); here each stays what it is in the checkpoint, and what meets
the input is one matrix as far as layers do not share parts of it.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)

from layershare.errors import LayershareError
from layershare.model.composition import Composition, Factor, Member, Stored, Term
from layershare.serve.vllm_factors import Held, Key, Part, Ranges, Store

SHARDS = {"q": 0, "k": 1, "v": 2}
"""What vLLM calls the parts of a fused q, k, v; those of other fused linears are numbers."""


class _Whole(Factor):
    """The weight of a linear that stayed dense."""

    def _named(self, rows: int, columns: int) -> Stored:
        return {"weight": ((rows, columns), None)}


@dataclass(frozen=True)
class Shard:
    """A linear of the checkpoint that vLLM's layer consists of, by its name relative to the base model.

    `composition`: what stands in its place; `None` if it is dense, or `dropped`.
    """

    name: str
    composition: Composition | None = None
    dropped: bool = False

    def terms(self, d_in: int, d_out: int) -> tuple[Member, tuple[Term, ...]]:
        """The linear of these widths, and what it is the sum of. Raises `LayershareError` if it has others."""
        if self.composition is None:
            return Member(self.name, d_in, d_out), () if self.dropped else (Term((_Whole("weight"),)),)
        member = self.composition.members[self.composition.names.index(self.name)]
        if (member.d_in, member.d_out) != (d_in, d_out):
            raise LayershareError(
                f"'{self.name}' is {d_in} × {d_out} in vLLM's model, but {member.d_in} × {member.d_out} in its "
                "composition: they are of different models."
            )
        return member, self.composition.terms_of(self.name)


class Sums(nn.Module):
    """What vLLM's layer computes: side by side, for each of its shards, Σ_terms f_m(… f_1(x)).

    `firsts`: what meets x, each with the widths of the factors that it joins; `shards`: the width of each, and of its
    terms which of the first products it goes on with, and the factors after that.
    """

    def __init__(
        self, firsts: Sequence[tuple[Part, list[int]]], shards: Sequence[tuple[int, list[tuple[int, list[Part]]]]]
    ) -> None:
        super().__init__()
        self.firsts = nn.ModuleList(part for part, _ in firsts)
        self.widths = [widths for _, widths in firsts]
        self.rests: Any = nn.ModuleList(nn.ModuleList(nn.Sequential(*rest) for _, rest in terms) for _, terms in shards)
        self.starts = [[start for start, _ in terms] for _, terms in shards]
        self.outward = [width for width, _ in shards]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        products: list[torch.Tensor] = []
        for first, widths in zip(self.firsts, self.widths, strict=True):
            products += first(x).split(widths, -1)
        sums = []
        for starts, rests, width in zip(self.starts, self.rests, self.outward, strict=True):
            terms = [rest(products[start]) for start, rest in zip(starts, rests, strict=True)]
            sums.append(sum(terms[1:], start=terms[0]) if terms else x.new_zeros(*x.shape[:-1], width))
        return sums[0] if len(sums) == 1 else torch.cat(sums, -1)


class LayershareLinearMethod(LinearMethodBase):
    """What vLLM asks to make, load and apply one of its linear layers, which consists of these shards."""

    def __init__(self, store: Store, shards: Sequence[Shard]) -> None:
        self.store, self.shards = store, shards
        self.dense = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Note what this process holds, and register parameters, by whose names vLLM brings it what it loads.

        Raises `LayershareError` if the layer has other widths than its members in config.json.
        """
        inward = _range(layer.tp_rank, input_size_per_partition, input_size)
        outward = _outward(layer, output_partition_sizes, fused=len(self.shards) == 1)
        self.widths = [sum(end - begin for begin, end in ranges) for _, ranges in outward]
        self.terms: list[list[list[Key]]] = []
        self.takes: list[dict[str, list[Held]]] = []
        for shard, (width, ranges) in zip(self.shards, outward, strict=True):
            member, terms = shard.terms(input_size, width)
            cuts = (inward,) if inward != (0, input_size) else None, ranges if ranges != ((0, width),) else None
            self.terms.append([[self._hold(member, factor, *cuts) for factor in term.factors] for term in terms])
            own = [factor for term in terms for factor in term.factors if factor.registered_by(member)]
            self.takes.append({name: self.store.loaded(member.name, each) for each in own for name in each.keys})
        self.store.read_by_one(self._firsts)
        for name in {"weight", *chain.from_iterable(self.takes)}:  # at "weight" there may be a guard of size zero
            placeholder = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            placeholder.weight_loader = partial(self._load, name)  # pyright: ignore[reportAttributeAccessIssue]
            *child, last = name.split(".")
            if child and not hasattr(layer, *child):
                layer.add_module(*child, nn.Module())
            (getattr(layer, *child) if child else layer).register_parameter(last, placeholder)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make what multiplies. Raises `LayershareError` if the checkpoint lacked a tensor."""
        self.store.fetch(layer.weight)
        firsts, starts = [], {}
        for keys in self.store.joined(self._firsts):
            for key in keys:
                starts[key] = len(starts)
            firsts.append((self.store.part(keys, self.dense), [self.store.width(key) for key in keys]))
        rests = [
            [(starts[first], [self.store.part((key,), self.dense) for key in rest]) for first, *rest in terms]
            for terms in self.terms
        ]
        layer.sums = Sums(firsts, list(zip(self.widths, rests, strict=True)))
        if layer.bias is not None and all(shard.dropped for shard in self.shards):
            layer.bias.data.zero_()  # it has gone, too, and was not loaded

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., in]` to `[..., out]`, this process's part of both."""
        y = layer.sums(x)
        return y if bias is None else y + bias

    @property
    def _firsts(self) -> tuple[Key, ...]:
        """What meets x, each once."""
        return tuple(dict.fromkeys(term[0] for terms in self.terms for term in terms))

    def _hold(self, member: Member, factor: Factor, inward: Ranges | None, outward: Ranges | None) -> Key:
        cuts = inward if factor.inward is None else None, outward if factor.outward is None else None
        key = Key(factor.home or member.name, factor.name, *cuts)
        self.store.hold(key, factor, member)
        return key

    def _load(self, name: str, placeholder: nn.Parameter, tensor: torch.Tensor, shard_id: Any = None) -> None:
        """Called by vLLM with a tensor of the checkpoint, and with which of the fused linears it is for."""
        index: Any = 0 if len(self.shards) == 1 else SHARDS.get(shard_id, shard_id)
        helds = self.takes[index].get(name, [])
        for held in helds:
            held.take(name, tensor, placeholder)
        if not helds and tensor.numel():  # no guard
            raise LayershareError(
                f"The checkpoint has '{self.shards[index].name}.{name}', which config.json has no place for: "
                "config.json and weights are of different models."
            )


def _range(index: int, size: int, whole: int) -> tuple[int, int]:
    return (index * size, (index + 1) * size) if size < whole else (0, whole)


def _outward(layer: LinearBase, sizes: Sequence[int], fused: bool) -> list[tuple[int, Ranges]]:
    """Of each linear of the checkpoint in a layer the width, and which of its outputs this process holds.

    `sizes`: what it holds of each that vLLM knows; `fused`: they are one in the checkpoint.
    """
    ranks, widths = [layer.tp_rank] * len(sizes), [layer.output_size]
    if isinstance(layer, QKVParallelLinear):  # a key-value head may be on several processes
        ranks[1:] = [layer.tp_rank // layer.num_kv_head_replicas] * 2
        kv = layer.total_num_kv_heads
        widths = [layer.total_num_heads * layer.head_size, kv * layer.head_size, kv * layer.v_head_size]
    elif isinstance(layer, MergedColumnParallelLinear):
        widths = layer.output_sizes
    ranges = [_range(*each) for each in zip(ranks, sizes, widths, strict=True)]
    if not fused:
        return [(width, (each,)) for width, each in zip(widths, ranges, strict=True)]
    total, begins = sum(widths), accumulate(widths[:-1], initial=0)
    if sizes == widths:
        return [(total, ((0, total),))]
    return [(total, tuple((at + begin, at + end) for at, (begin, end) in zip(begins, ranges, strict=True)))]
