"""The real forward of a batch, which waits at every block for that block's output."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershare.calibrate.drivers.calls import Call
from layershare.errors import UnsupportedModelError
from layershare.model.weights import Weights


class _Left(BaseException):
    """Raised inside a forward that is no longer wanted."""


class Walk(Thread):
    """The real forward of one batch in a thread of its own, which waits at each block for that block's output.

    It runs only while its owner waits for it, so never two of them at a time. It ends at the last block's call: the
    final norm and the output head are not run.
    """

    def __init__(self, shell: PreTrainedModel, tokens: Tensor, n_blocks: int) -> None:
        """Start the forward of `shell`, a model prepared by `parking`, on token ids [rows, length]."""
        super().__init__(daemon=True)
        self.call: Call
        self._shell = shell
        self._tokens = tokens
        self._n_blocks = n_blocks
        self._at = -1
        self._calls: SimpleQueue[tuple[int, Call] | BaseException] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self.start()

    def run(self) -> None:
        """In this thread: the forward."""
        try:
            with torch.no_grad():
                self._shell(input_ids=self._tokens, use_cache=False)
            self._calls.put(self._out_of_order())
        except _Left:
            pass
        except BaseException as error:
            self._calls.put(error)

    def visit(self, block: int, call: Call) -> Any:
        """In this thread, in place of a block's forward: hand the arguments over and wait for the output."""
        self._calls.put((block, call))
        answer = self._answers.get()
        if isinstance(answer, _Left):
            raise answer
        return answer

    def arrive(self) -> None:
        """In the owner's thread: wait until the forward has reached the next block, and set `call`."""
        arrival = self._calls.get()
        if isinstance(arrival, BaseException):
            raise arrival
        block, self.call = arrival
        self._at += 1
        if block != self._at:
            raise self._out_of_order()

    def answer(self, output: Any) -> None:
        """Give the current block's output to the forward and let it go to the next block, if there is one."""
        if self._at < self._n_blocks - 1:
            self._answers.put(output)
            self.arrive()

    def leave(self) -> None:
        """Abandon the forward."""
        self._answers.put(_Left())
        self.join()

    def _out_of_order(self) -> UnsupportedModelError:
        name = type(self._shell).__name__
        return UnsupportedModelError(f"{name} does not call its blocks once each and in order; it cannot be streamed.")


def parking(weights: Weights) -> PreTrainedModel:
    """The model without its blocks' weights, whose blocks hand their calls over to the Walk that they run in."""
    shell = weights.shell()
    for i, block in enumerate(cast(nn.ModuleList, shell.get_submodule(weights.blocks_name))):
        block.forward = partial(_visit, i)
    return shell


def _visit(block: int, *args: Any, **kwargs: Any) -> Any:
    return cast(Walk, current_thread()).visit(block, (args, kwargs))


@contextmanager
def walking(shell: PreTrainedModel, tokens: Tensor, n_blocks: int) -> Iterator[Walk]:
    """A forward that has reached its first block, and is abandoned afterwards."""
    walk = Walk(shell, tokens, n_blocks)
    try:
        walk.arrive()
        yield walk
    finally:
        walk.leave()
