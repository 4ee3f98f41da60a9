"""The way back through a model: the gradients of the token loss at the outputs of its linears, block after block.

A forward pass leaves the hidden states that enter each block; then every block is run again from its own, last block
first, and hands the gradient at its input on to the one before. Memory holds one block, one batch's activations and the
hidden states of all blocks, the last in files if asked for.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from layershare.calibrate.drivers import Call, hidden_input, hidden_output, with_hidden_input
from layershare.calibrate.stream import Stream
from layershare.errors import UnsupportedModelError
from layershare.model.modes import evaluating
from layershare.model.weights import Weights

Gradients = dict[str, Tensor]
"""A linear's name, relative to its block -> the gradients at its output [tokens, d_out]."""


class Trail:
    """What a forward pass leaves for the way back.

    for layer, block in stream:
        trail.keep()    # for every block, before or after it runs
    for layer, batches in trail.back(lambda layer: names of linears):
        for gradients in batches:
            ...
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._states: list[Tensor] = []
        self._calls: list[list[Call]] = []

    def keep(self) -> None:
        """Keep how the current block of the stream is called.

        Raises `UnsupportedModelError` for models that do not only hand hidden states from block to block.
        """
        if self._stream.lock_step:
            raise UnsupportedModelError(
                "The blocks of this model hand on more than hidden states, so gradients cannot be measured block by "
                "block; use a method or option that needs none."
            )
        batches, calls = self._stream.batches, []
        states: Tensor | None = None
        for batch in range(len(batches)):
            call = self._stream.call(batch)
            entering = hidden_input(call)
            states = batches.room(entering) if states is None else states
            batches.rows(states, batch).copy_(entering)
            calls.append(with_hidden_input(call, None))
        assert states is not None
        self._states.append(states)
        self._calls.append(calls)

    def back(self, linears: Callable[[int], Collection[str]]) -> Iterator[tuple[int, Iterator[Gradients]]]:
        """Yield every layer, last one first, with the gradients of its `linears`, batch after batch.

        They are those of Σ −log p(next token) over all tokens that have a next one. All batches are to be taken before
        the next layer is asked for.
        """
        leaving: Tensor | None = None  # the gradient at a block's output, of all batches
        for layer in reversed(range(len(self._calls))):
            states = self._states.pop()
            arriving = self._stream.batches.room(states[:1])
            yield layer, self._through(layer, linears(layer), states, leaving, arriving)
            leaving = arriving

    def _through(
        self, layer: int, names: Collection[str], states: Tensor, leaving: Tensor | None, arriving: Tensor
    ) -> Iterator[Gradients]:
        """Run a block forwards and backwards, batch after batch, and fill in the gradient at its input, `arriving`."""
        weights, batches = self._stream.weights, self._stream.batches
        head = Head(weights) if leaving is None else None
        with weights.block(layer) as block, evaluating(block), _outputs(block, names) as outputs:
            for batch in range(len(batches)):
                entering = batches.rows(states, batch).to(weights.device, copy=True).requires_grad_()
                args, kwargs = with_hidden_input(self._calls[layer][batch], entering)
                with torch.enable_grad():
                    output = block(*args, **kwargs)
                    if head is not None:
                        target, cotangent = head.loss(batches.rows(batches.tokens, batch), output), None
                    else:
                        assert leaving is not None
                        target = hidden_output(output)
                        cotangent = batches.rows(leaving, batch).to(weights.device)
                    wanted = [entering, *outputs.values()]
                    first, *others = torch.autograd.grad(target, wanted, cotangent)
                batches.rows(arriving, batch).copy_(first)
                yield {name: each.flatten(0, -2) for name, each in zip(outputs, others, strict=True)}
                outputs.clear()


class Head:
    """What comes after the last block: its norm and the output head."""

    def __init__(self, weights: Weights) -> None:
        self._model = weights.shell(head=True)
        self._device = weights.device
        self._output: Any = None
        for block in cast(nn.ModuleList, self._model.get_submodule(weights.blocks_name)):
            block.forward = lambda *args, **kwargs: self._output

    def logits(self, tokens: Tensor, output: Any) -> Tensor:
        """The logits [rows, length, vocabulary] of `tokens` [rows, length], given what the last block returns."""
        self._output = output
        logits = self._model(input_ids=tokens.to(self._device), use_cache=False).logits
        self._output = None
        return logits

    def loss(self, tokens: Tensor, output: Any) -> Tensor:
        """Σ −log p(next token) [] of `tokens`, given what the last block returns."""
        logits = self.logits(tokens, output)[:, :-1].float()
        return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().to(self._device), reduction="sum")


@contextmanager
def _outputs(block: nn.Module, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """What the named linears of a block return while it runs, by name."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: outputs.__setitem__(name, output)

    hooks = [block.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
