"""Run a model block after block: every batch passes one block before the next block is loaded.

Memory then holds one block, one batch's activations and the hidden states of all batches, the last in files if
asked for. How the blocks' arguments are found without knowing the architecture is told in `drivers`.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from layershare.calibrate.drivers import Driver
from layershare.calibrate.drivers.batches import Batches
from layershare.calibrate.drivers.calls import Call, hidden_input, hidden_output, with_hidden_input
from layershare.calibrate.drivers.lock_step import LockStep
from layershare.calibrate.drivers.replay import record
from layershare.model.modes import evaluating
from layershare.model.weights import Weights


class Stream:
    """Iterate over a model's blocks, passing batches of text through each of them.

    for i, block in Stream(weights, tokens, batch_size=4):
        ...             # attach hooks to `block`, or replace some of its modules
        stream.run()    # may be repeated: the last run's outputs are the next block's inputs

    A body that does not call `run` leaves it to the iterator. Changes to a block read from disk vanish with it; on a
    model in memory whoever made them undoes them. Everything runs in eval mode and without gradients, and iterating
    again starts from block 0 and gives the same bits.
    """

    def __init__(
        self,
        weights: Weights,
        tokens: Tensor,
        batch_size: int,
        scratch: Path | None = None,
        *,
        lock_step: bool = False,
    ) -> None:
        """`tokens`: LongTensor [n, length], passed `batch_size` rows at a time.

        Hidden states are kept in memory or, if `scratch` is given, in nameless files in that folder.
        `lock_step` asks for that driver at once, without trying to replay.
        """
        self.weights = weights
        self.batches = Batches(tokens, batch_size, scratch)
        self.lock_step = lock_step
        self._block: nn.Module | None = None
        self._driver: Driver | None = None
        self._outputs: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index, loaded block), first block first.

        Sets `lock_step` if the model cannot be replayed. Raises UnsupportedModelError if the model does not call its
        blocks once each and in order, LayershareError if `scratch` is too small.
        """
        replay = None if self.lock_step else record(self.weights, self.batches)
        self.lock_step = replay is None
        driver = self._driver = replay or LockStep(self.weights, self.batches)
        try:
            for i in range(len(self.weights.blocks)):
                self._outputs = None
                with self.weights.block(i) as self._block:
                    yield i, self._block
                    if self._outputs is None:
                        self.run()
                self._block = None
                driver.advance(self.outputs)
        finally:
            self._block = self._driver = None
            driver.close()

    @property
    def outputs(self) -> Tensor:
        """Hidden states [n, length, width] that the last `run` produced; after the loop, the last block's."""
        if self._outputs is None:
            raise RuntimeError("The current block has not been run yet.")
        return self._outputs

    def call(self, batch: int) -> Call:
        """The arguments (args, kwargs) with which the model calls the current block on a batch, on its device.

        The hidden states among them are a copy, free to be changed.
        """
        if self._driver is None:
            raise RuntimeError("There is a current block only inside a loop over the stream.")
        call = self._driver.call(batch)
        return with_hidden_input(call, hidden_input(call).to(self.weights.device, copy=True))

    @torch.no_grad()
    def run(self) -> None:
        """Call the current block on every batch."""
        if self._block is None or self._driver is None:
            raise RuntimeError("There is a current block only inside a loop over the stream.")
        with evaluating(self._block):
            for batch in range(len(self.batches)):
                args, kwargs = self.call(batch)
                output = self._block(*args, **kwargs)
                if self._outputs is None:
                    self._outputs = self.batches.room(hidden_output(output))
                self.batches.rows(self._outputs, batch).copy_(hidden_output(output))
                self._driver.keep(batch, output)
                del args, kwargs, output  # or they would stay while the next batch passes the block
