"""How each kind of statistics is measured: what watches a model while text passes, and what it adds up.

What adds up are sums over tokens, and nothing divides before `finish`. So processes that each measure a part of a text
could add up their `sums` and finish with what a single one finds.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from layershare.calibrate.drivers.calls import Call, hidden_input, hidden_output, with_hidden_input
from layershare.errors import LayershareError
from layershare.model.arch import Linear, Spec
from layershare.model.dropped import drop_mlp
from layershare.model.modes import evaluating
from layershare.model.weights import twin

_ROWS = 256
"""Tokens that are widened to float32 at once."""


class Measure(Protocol):
    """Statistics of one layer while they are measured."""

    sums: dict[str, Tensor]
    """What was seen so far: sums over tokens."""

    def attach(self, module: nn.Module, /) -> AbstractContextManager[None]:
        """Watch a module, the layer's block or the whole model, for the duration."""
        ...

    def finish(self) -> dict[str, Tensor]:
        """The statistics, by the names that they are stored under. Raises `LayershareError` if one is not finite."""
        ...


class InputGrams:
    """G = XᵀX (d × d, float32) of the inputs of modules, each under the name of its site.

    With `magnitudes` also the mean of |x| (d, float32), under `SITE.magnitude`.
    """

    def __init__(self, sites: Mapping[str, str], *, magnitudes: bool = False) -> None:
        """`sites`: site -> the name, within the block, of the module whose input it is."""
        self.sums: dict[str, Tensor] = {}
        self._sites, self._magnitudes = sites, magnitudes

    @contextmanager
    def attach(self, block: nn.Module) -> Iterator[None]:
        """Watch the inputs of a block's modules."""
        with ExitStack() as hooks:
            for site, name in self._sites.items():
                hooks.enter_context(block.get_submodule(name).register_forward_pre_hook(partial(self._add, site)))
            yield

    def _add(self, site: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        _add_gram(self.sums, site, x)
        if self._magnitudes:
            magnitude = _sum(self.sums, f"{site}.magnitude", x.shape[-1:], x.device)
            for rows in _widened(x):
                magnitude += torch.linalg.vector_norm(rows, 1, dim=0)

    def finish(self) -> dict[str, Tensor]:
        """The Grams, and the mean magnitudes."""
        found = {}
        for site in self._sites:
            gram = found[site] = self.sums[site]
            if not gram.diagonal().isfinite().all():
                raise LayershareError(
                    f"The inputs of '{site}' overflow or contain NaN on this text; run the model in a wider dtype."
                )
            if self._magnitudes:
                magnitude = f"{site}.magnitude"
                found[magnitude] = self.sums[magnitude] / int(self.sums[_tokens(site)])
        return found


def site_modules(spec: Spec, layer: int) -> dict[str, str]:
    """Site -> the name, within its block, of the module whose input it is."""
    return {linear.site: spec.within(layer, linear.site) for linear in spec.linears if linear.layer == layer}


class Changes:
    """How much a block and its sub-layers change the hidden states, and what they are at the end of each text block.

    `cosines` (3, float64): the mean cosine over tokens between what enters attention, MLP and block, and what leaves
    it; `pooled` (n × width, float32): the hidden states of the last token of each text block when they leave.

    The hidden states between attention and MLP are the block's output without its MLP (in a block that runs the two in
    parallel, with the attention's contribution alone).
    """

    def __init__(self, name: str, mlp: Collection[str], rows: int) -> None:
        """`name`: the block's; `mlp`: its MLP's linears, the one that writes last; `rows`: blocks of the text."""
        self.sums = {"cosines": torch.zeros(3, dtype=torch.float64), "tokens": torch.zeros((), dtype=torch.int64)}
        self._name, self._mlp, self._rows = name, tuple(mlp), rows
        self._seen = 0
        self._entering: Tensor | None = None

    @contextmanager
    def attach(self, block: nn.Module) -> Iterator[None]:
        """Watch what enters and leaves a block, which is run on the text's blocks in order.

        Attach it before what watches the block's modules: its copy of the block would be watched, too.
        """
        without = twin(block)
        drop_mlp(without, self._mlp)
        with (
            evaluating(without),
            block.register_forward_pre_hook(self._enter, with_kwargs=True),
            block.register_forward_hook(partial(self._leave, without), with_kwargs=True),
        ):
            yield

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entering = hidden_input((args, kwargs)).clone()  # the block may change its own

    def _leave(self, without: nn.Module, block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        assert self._entering is not None
        again: Call = with_hidden_input((args, kwargs), self._entering.clone())
        between = hidden_output(without(*again[0], **again[1])).float()
        entering, leaving = self._entering.float(), hidden_output(output).float()
        for i, (before, after) in enumerate(((entering, between), (between, leaving), (entering, leaving))):
            self.sums["cosines"][i] += torch.cosine_similarity(before, after, dim=-1).sum().item()
        self.sums["tokens"] += entering[..., 0].numel()
        # Rows that were not seen are zero, so that these are sums, too.
        pooled = _sum(self.sums, "pooled", (self._rows, leaving.shape[-1]), torch.device("cpu"))
        pooled[self._seen : self._seen + len(leaving)] = leaving[:, -1]
        self._seen += len(leaving)
        self._entering = None

    def finish(self) -> dict[str, Tensor]:
        """Cosines and pooled states."""
        if not self.sums["cosines"].isfinite().all():
            raise LayershareError(
                f"The hidden states of '{self._name}' overflow or contain NaN on this text; run the model in a "
                "wider dtype."
            )
        return {"cosines": self.sums["cosines"] / int(self.sums["tokens"]), "pooled": self.sums["pooled"]}


class GradientGrams:
    """Γ, the mean of gᵀg over tokens (d_out × d_out, float32), by a linear's name; g is the gradient at its output."""

    def __init__(self, linears: Mapping[str, str]) -> None:
        """`linears`: the name within the block -> the name."""
        self.sums: dict[str, Tensor] = {}
        self._linears = linears

    @contextmanager
    def attach(self, block: nn.Module) -> Iterator[None]:
        """Watch what comes back to a block's linears while it runs forwards and backwards."""
        with ExitStack() as hooks:
            for inside, name in self._linears.items():
                hooks.enter_context(block.get_submodule(inside).register_forward_hook(partial(self._watch, name)))
            yield

    def _watch(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(partial(_add_gram, self.sums, name))

    def finish(self) -> dict[str, Tensor]:
        """The mean Grams."""
        for name in self._linears.values():
            _require_finite_gradients(name, self.sums[name].diagonal())
        return {name: self.sums[name] / int(self.sums[_tokens(name)]) for name in self._linears.values()}


class SquaredGradients:
    """Σⱼ E[(∂L/∂W)²ᵢⱼ] (d_in, float32) of linears, by their names, L the mean loss of one block of text.

    Every block of text is to pass forwards and backwards alone, or the square of their mean gradient would depend on
    how many there are at once; and with the sum of the loss over the tokens, so that float16 holds the gradients.
    """

    def __init__(self, linears: Mapping[str, Linear], blocks: int, targets: int) -> None:
        """`linears`: the weight's name -> its linear; of a text of so many `blocks` with so many `targets` each."""
        self.sums: dict[str, Tensor] = {}
        self._linears, self._blocks, self._targets = linears, blocks, targets

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[None]:
        """Watch the gradients of a model's weights, which go as soon as they were seen: one at a time is in memory."""
        with ExitStack() as hooks:
            for name, linear in self._linears.items():
                weight = model.get_parameter(name).requires_grad_()
                _sum(self.sums, linear.name, (linear.d_in,), weight.device)
                hooks.enter_context(weight.register_post_accumulate_grad_hook(partial(self._add, linear)))
            yield

    def _add(self, linear: Linear, weight: Tensor) -> None:
        assert weight.grad is not None
        self.sums[linear.name] += weight.grad.float().square().sum(1 if linear.conv1d else 0)
        weight.grad = None

    def finish(self) -> dict[str, Tensor]:
        """The mean squares."""
        for name, total in self.sums.items():
            _require_finite_gradients(name, total)
        return {name: total / self._blocks / self._targets**2 for name, total in self.sums.items()}


def gram_of(batches: Iterable[Tensor]) -> Tensor:
    """XᵀX (float32) of tensors [..., d], of which there is at least one."""
    sums: dict[str, Tensor] = {}
    for batch in batches:
        _add_gram(sums, "gram", batch)
    return sums["gram"]


def _add_gram(sums: dict[str, Tensor], name: str, x: Tensor) -> None:
    """Add XᵀX of x [..., d], and beside it its tokens."""
    gram = _sum(sums, name, (x.shape[-1], x.shape[-1]), x.device)
    for rows in _widened(x):
        gram.addmm_(rows.T, rows)
    tokens = _sum(sums, _tokens(name), (), x.device, torch.int64)
    tokens += x[..., 0].numel()


def _tokens(name: str) -> str:
    """Where the number of tokens is kept that a sum is over."""
    return f"{name}.tokens"


def _sum(
    sums: dict[str, Tensor], name: str, shape: Collection[int], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The sum of that name, which begins with zeros."""
    if name not in sums:
        sums[name] = torch.zeros(tuple(shape), dtype=dtype, device=device)
    return sums[name]


def _widened(x: Tensor) -> Iterator[Tensor]:
    """The rows of x [..., d] in float32, some at a time."""
    return (rows.float() for rows in x.flatten(0, -2).split(_ROWS))


def _require_finite_gradients(name: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise LayershareError(f"The gradients of '{name}' overflow; run the model in a wider dtype.")
