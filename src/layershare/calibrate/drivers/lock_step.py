"""Lock step: every batch's own forward, parked at the current block."""

from typing import Any

from torch import Tensor

from layershare.calibrate.drivers.batches import Batches
from layershare.calibrate.drivers.calls import Call, with_hidden_output
from layershare.calibrate.drivers.walk import Walk, parking
from layershare.model.weights import Weights


class LockStep:
    """The driver that knows the arguments of a block once every forward has reached it."""

    def __init__(self, weights: Weights, batches: Batches) -> None:
        shell = parking(weights)
        self._batches = batches
        self._device = weights.device
        self._walks: list[Walk] = []
        self._outputs: list[Any] = [None] * len(batches)
        try:
            for batch in range(len(batches)):
                tokens = batches.rows(batches.tokens, batch).to(weights.device)
                self._walks.append(Walk(shell, tokens, len(weights.blocks)))
                self._walks[-1].arrive()
        except BaseException:
            self.close()
            raise

    def call(self, batch: int) -> Call:
        """The arguments with which the batch's forward called the block."""
        return self._walks[batch].call

    def keep(self, batch: int, output: Any) -> None:
        """Keep what else than the hidden states the forward expects from the block."""
        self._outputs[batch] = with_hidden_output(output, None)

    def advance(self, states: Tensor) -> None:
        """Answer every forward and wait until it has reached the next block."""
        for batch, walk in enumerate(self._walks):
            rows = self._batches.rows(states, batch).to(self._device)
            walk.answer(with_hidden_output(self._outputs[batch], rows))

    def close(self) -> None:
        """Abandon the forwards."""
        for walk in self._walks:
            walk.leave()
