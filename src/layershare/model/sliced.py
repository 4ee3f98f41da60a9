"""Sliced models: the modules that stand where a narrower residual stream is normed, read and written.

A block keeps its own code, which computes x + o with o from the sub-layer's writer. The paper's x·S + o, with the
shortcut matrix S = QᵀQ′, comes about as x + (o + x(S − 1)): the writer holds the matrix Δ = S − 1, and is handed x by
the norm of its sub-layer, which has just seen it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layershare.errors import LayershareError
from layershare.model.prenorm import PreNorm, SubLayer


@dataclass(frozen=True)
class Sliced:
    """How a model was sliced: the residual stream that it had, and the `width` that is left of it."""

    width: int
    stream: PreNorm

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Sliced:
        """Read what stands in `config.json`. Raises `TypeError` for unknown or missing entries."""
        stream = dict(values["stream"])
        stream["embeddings"] = tuple(stream["embeddings"])
        stream["sublayers"] = tuple(SubLayer(**{**s, "readers": tuple(s["readers"])}) for s in stream["sublayers"])
        return cls(**{**values, "stream": PreNorm(**stream)})


class SlicedNorm(nn.Module):
    """RMSNorm without weights of what is left of x: x / √(Σxᵢ²/D + ε), with D the width before slicing.

    The last norm is followed by no writer, so it keeps no reference to x.
    """

    def __init__(self, width: int, eps: float, *, hands_on: bool = True) -> None:
        super().__init__()
        self.width, self.eps, self.hands_on = width, eps, hands_on
        self._entered: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., width]` to the same."""
        if self.hands_on:
            self._entered = x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.width + self.eps)).to(x.dtype)

    def take(self) -> torch.Tensor:
        """The last x, once."""
        x, self._entered = self._entered, None
        if x is None:
            raise RuntimeError("A sliced sub-layer wrote twice for one reading.")
        return x

    def extra_repr(self) -> str:
        """What `print(model)` shows of this norm."""
        return f"of {self.width}, eps={self.eps}"


class Shortcut(nn.Module):
    """x to xΔ, `[..., width]` to the same; no `nn.Linear`, so that PEFT's `all-linear` adapts the writer alone."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width, device="meta", dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The weight is stored as Δᵀ, as `nn.Linear` would."""
        return nn.functional.linear(x, self.weight)


class _ShortcutWriter:
    """What a writer needs for the residual: its shortcut matrix, and the norm that has seen x."""

    shortcut: Shortcut
    _norm: tuple[SlicedNorm]

    def _connect(self, width: int, norm: SlicedNorm, dtype: torch.dtype) -> None:
        self.shortcut = Shortcut(width, dtype)
        self._norm = (norm,)  # in a tuple, so that it is not registered a second time

    def _with_residual(self, written: torch.Tensor) -> torch.Tensor:
        return written + self.shortcut(self._norm[0].take()).view_as(written)


class ShortcutLinear(_ShortcutWriter, nn.Linear):
    """A writer xW + b, plus the shortcut xΔ of the residual."""

    def __init__(self, d_in: int, width: int, bias: bool, norm: SlicedNorm, dtype: torch.dtype) -> None:
        super().__init__(d_in, width, bias, device="meta", dtype=dtype)
        self._connect(width, norm, dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., d_in]` to `[..., width]`."""
        return self._with_residual(super().forward(input))


class ShortcutConv1D(_ShortcutWriter, Conv1D):
    """The same for transformers' `Conv1D`."""

    def __init__(self, d_in: int, width: int, norm: SlicedNorm, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            super().__init__(width, d_in)
        self.to(dtype)
        self._connect(width, norm, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., d_in]` to `[..., width]`."""
        return self._with_residual(super().forward(x))


def sliced_sublayer(find: Callable[[str], Any], part: SubLayer, stream: PreNorm, width: int) -> dict[str, nn.Module]:
    """Name -> what stands in for norm, readers and writer of a sub-layer, the tensors uninitialised.

    `find` gives the dense modules by name.
    """
    norm = SlicedNorm(stream.width, stream.eps)
    dense = find(part.writer)
    if isinstance(dense, Conv1D):
        writer = ShortcutConv1D(dense.nx, width, norm, dense.weight.dtype)
    else:
        writer = ShortcutLinear(dense.in_features, width, dense.bias is not None, norm, dense.weight.dtype)
    new = {part.norm: norm, part.writer: writer.to_empty(device=dense.weight.device)}
    new |= {name: sliced_reader(find(name), width, stream.shifted) for name in part.readers}
    return {name: module.train(find(name).training) for name, module in new.items()}


def sliced_reader(dense: Any, width: int, shifted: bool) -> nn.Module:
    """A linear that reads the sliced stream, uninitialised; with a bias if it had one or the norm's falls to it."""
    with torch.device("meta"):
        if isinstance(dense, Conv1D):
            reader: nn.Module = Conv1D(dense.nf, width)
        else:
            reader = nn.Linear(width, dense.out_features, bias=dense.bias is not None or shifted)
    return reader.to(dense.weight.dtype).to_empty(device=dense.weight.device)


def slice_modules(model: PreTrainedModel, sliced: Sliced) -> None:
    """Put the narrower modules into a dense model, in place: on a meta skeleton or a real model.

    Embeddings keep their module, because families scale or shift in it. Raises `LayershareError`, with the model
    unchanged, if it has no modules of the names, or a head for another task.
    """
    base, stream, width = model.base_model, sliced.stream, sliced.width
    head = model.get_output_embeddings()
    if head is None and model is not base:
        raise LayershareError(
            f"A sliced model cannot be a {type(model).__name__}: its hidden states are narrower than that head reads; "
            "load it as a causal language model, or as its base model (AutoModel)."
        )
    modules: dict[str, Any] = dict(base.named_modules())
    parts = stream.sublayers
    names = [*stream.embeddings, stream.final_norm, *(name for part in parts for name in (part.norm, part.writer))]
    for name in (*names, *(name for part in parts for name in part.readers)):
        if name not in modules:
            raise LayershareError(f"The model has no '{name}', which config.json says was sliced: repair config.json.")
    for name in stream.embeddings:
        embedding = modules[name]
        weight = embedding.weight
        empty = torch.empty(len(weight), width, device=weight.device, dtype=weight.dtype)
        embedding.weight, embedding.embedding_dim = nn.Parameter(empty), width
    for part in parts:
        for name, module in sliced_sublayer(modules.__getitem__, part, stream, width).items():
            base.set_submodule(name, module)
    norm = SlicedNorm(stream.width, stream.eps, hands_on=False)
    base.set_submodule(stream.final_norm, norm.train(modules[stream.final_norm].training))
    if head is not None:
        model.set_output_embeddings(sliced_reader(head, width, stream.shifted))


@contextmanager
def standing_in(parent: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
    """`parent` with other modules under these names, for the duration."""
    dense = {name: parent.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            parent.set_submodule(name, module)
        yield
    finally:
        for name, module in dense.items():
            parent.set_submodule(name, module)
