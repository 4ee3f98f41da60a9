"""The way back through a model: the gradients of the token loss at the outputs of its linears, block after block.

A forward pass leaves the hidden states that enter each block; then every block is run again from its own, last block
first, and hands the gradient at its input on to the one before. Memory holds one block, one batch's activations and the
hidden states of all blocks, the last in files if asked for.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from layershare.calibrate.drivers.calls import Call, hidden_input, hidden_output, with_hidden_input
from layershare.calibrate.stream import Stream
from layershare.errors import UnsupportedModelError
from layershare.model.modes import evaluating
from layershare.model.weights import Weights


class Trail:
    """What a forward pass leaves for the way back.

    for layer, block in stream:
        trail.keep()    # for every block, before or after it runs
    for layer, block in trail.back():
        ...             # attach hooks to `block`
        trail.run()     # once
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._states: list[Tensor] = []
        self._calls: list[list[Call]] = []
        self._layer = 0
        self._block: nn.Module | None = None
        self._leaving: Tensor | None = None  # the gradient at the output of the current block, of all batches

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

    def back(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index, loaded block), last block first; every one is to be run before the next is asked for."""
        for layer in reversed(range(len(self._calls))):
            with self._stream.weights.block(layer) as block:
                self._layer, self._block = layer, block
                yield layer, block
            self._block = None

    def run(self) -> None:
        """Run the current block forwards and backwards on every batch.

        What comes back is the gradient of Σ −log p(next token) over all tokens that have a next one.
        """
        assert self._block is not None
        weights, batches, states = self._stream.weights, self._stream.batches, self._states.pop()
        arriving = batches.room(states[:1])
        head = Head(weights) if self._leaving is None else None
        with evaluating(self._block):
            for batch in range(len(batches)):
                entering = batches.rows(states, batch).to(weights.device, copy=True).requires_grad_()
                args, kwargs = with_hidden_input(self._calls[self._layer][batch], entering)
                with torch.enable_grad():
                    output = self._block(*args, **kwargs)
                    if head is not None:
                        target, cotangent = head.loss(batches.rows(batches.tokens, batch), output), None
                    else:
                        assert self._leaving is not None
                        target = hidden_output(output)
                        cotangent = batches.rows(self._leaving, batch).to(weights.device)
                    (gradient,) = torch.autograd.grad(target, entering, cotangent)
                batches.rows(arriving, batch).copy_(gradient)
        self._leaving = arriving


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
