"""Which arguments each block of a model gets for each batch. Two drivers, neither of which knows any architecture.

*Record and replay.* The real forward runs once per batch with blocks that hand their input on unchanged, and the
arguments of every block are recorded. Block i is then called with the hidden states that block i - 1 produced and
its recorded other arguments (masks, positions, rotary tables).

*Lock step.* The real forward of every batch stands in a thread of its own, parked at block i until that block's
output is there. It assumes only that the forward calls its blocks once each and in order, but keeps all that every
forward holds in memory.

Replay is right exactly when, between two blocks, the forward hands on the hidden states as they are, and the blocks'
other arguments do not depend on what the blocks computed. That is checked, without reading more than the first
block, by two forwards of one sequence whose blocks answer with different made-up hidden states: both must hand those
on bit for bit, and all other arguments must agree bit for bit. They must also be tensors, tuples or plain values,
because blocks could talk to each other through a list, dictionary or cache. Otherwise lock step is used.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import NamedTemporaryFile
from threading import Thread, current_thread
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershare.disk import require_disk, writing
from layershare.errors import UnsupportedModelError
from layershare.model.modes import evaluating
from layershare.model.weights import Weights

Call = tuple[tuple[Any, ...], dict[str, Any]]
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class Batches:
    """Token ids [n, length] in batches of `size` rows, and the room for their hidden states."""

    def __init__(self, tokens: Tensor, size: int, scratch: Path | None) -> None:
        self.tokens = tokens
        self.size = size
        self._scratch = scratch

    def __len__(self) -> int:
        return math.ceil(len(self.tokens) / self.size)

    def rows(self, states: Tensor, batch: int) -> Tensor:
        """The part [rows, ...] of a tensor [n, ...] that belongs to one batch."""
        return states[batch * self.size : (batch + 1) * self.size]

    def room(self, like: Tensor) -> Tensor:
        """Uninitialised hidden states [n, length, width] on the CPU, given some of one batch."""
        shape = (len(self.tokens), *like.shape[1:])
        if self._scratch is None:
            return torch.empty(shape, dtype=like.dtype)
        size = math.prod(shape)
        require_disk({self._scratch: size * like.itemsize})
        # The file's name goes at once, so that its room on the disk returns with the tensor, however the process ends.
        with (
            writing(self._scratch, needed=size * like.itemsize),
            NamedTemporaryFile(dir=self._scratch, prefix="states-") as file,
        ):
            # Room is taken now: a disk that is full when the memory map is written to would kill the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size * like.itemsize)
            return torch.from_file(file.name, shared=True, size=size, dtype=like.dtype).view(shape)


class Driver(Protocol):
    """What knows the arguments of the current block for every batch."""

    def call(self, batch: int) -> Call:
        """The current block's arguments for a batch."""
        ...

    def keep(self, batch: int, output: Any) -> None:
        """Take note of what the block returned, apart from the hidden states."""
        ...

    def advance(self, states: Tensor) -> None:
        """Go on to the next block, which `states` [n, length, width] enter."""
        ...

    def close(self) -> None:
        """Let go of everything; no block is current any more."""
        ...


class Replay:
    """Record and replay: the recorded arguments of each batch and block, with the hidden states put in."""

    def __init__(self, batches: Batches, calls: list[list[Call]], states: Tensor, in_tuple: bool) -> None:
        self._batches = batches
        self._calls = calls
        self._states = states
        self._in_tuple = in_tuple
        self._block = 0

    def call(self, batch: int) -> Call:
        """The recorded arguments, with the current hidden states."""
        return with_hidden_input(self._calls[batch][self._block], self._batches.rows(self._states, batch))

    def keep(self, batch: int, output: Any) -> None:
        """Make sure that the recording, which took all blocks to return what block 0 does, was right."""
        if isinstance(output, tuple) != self._in_tuple:
            raise UnsupportedModelError(
                f"Block {self._block} returns another kind of output than block 0: this model cannot be streamed."
            )

    def advance(self, states: Tensor) -> None:
        """Take `states` for the hidden states."""
        self._states = states
        self._block += 1

    def close(self) -> None:
        """Forget the recording."""
        self._calls.clear()


class LockStep:
    """Lock step: every batch's own forward, parked at the current block."""

    def __init__(self, weights: Weights, batches: Batches) -> None:
        shell = _parking(weights)
        self._batches = batches
        self._device = weights.device
        self._walks: list[_Walk] = []
        self._outputs: list[Any] = [None] * len(batches)
        try:
            for batch in range(len(batches)):
                tokens = batches.rows(batches.tokens, batch).to(weights.device)
                self._walks.append(_Walk(shell, tokens, len(weights.blocks)))
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


class _Left(BaseException):
    """Raised inside a forward that is no longer wanted."""


class _Walk(Thread):
    """The real forward of one batch in a thread of its own, which waits at each block for that block's output.

    It runs only while its owner waits for it, so never two of them at a time. It ends at the last block's call: the
    final norm and the output head are not run.
    """

    def __init__(self, shell: PreTrainedModel, tokens: Tensor, n_blocks: int) -> None:
        """Start the forward of `shell`, a model prepared by `_parking`, on token ids [rows, length]."""
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


def _parking(weights: Weights) -> PreTrainedModel:
    """The model without its blocks' weights, whose blocks hand their calls over to the _Walk that they run in."""
    shell = weights.shell()
    for i, block in enumerate(cast(nn.ModuleList, shell.get_submodule(weights.blocks_name))):
        block.forward = partial(_visit, i)
    return shell


def _visit(block: int, *args: Any, **kwargs: Any) -> Any:
    return cast(_Walk, current_thread()).visit(block, (args, kwargs))


def record(weights: Weights, batches: Batches) -> Replay | None:
    """Record the arguments of all blocks for all batches; None if the model cannot be replayed."""
    shell, n_blocks = _parking(weights), len(weights.blocks)
    form = _replayable_form(weights, shell, batches.tokens[:1].to(weights.device))
    if form is None:
        return None
    states: Tensor | None = None
    calls: list[list[Call]] = []
    for batch in range(len(batches)):
        with _walking(shell, batches.rows(batches.tokens, batch).to(weights.device), n_blocks) as walk:
            entering = hidden_input(walk.call)
            states = batches.room(entering) if states is None else states
            batches.rows(states, batch).copy_(entering)
            calls.append([])
            for i in range(n_blocks):
                # Masks and tables are mostly the same in all blocks and batches: one copy of each is kept.
                call = with_hidden_input(walk.call, None)
                call = _shared(call, calls[-1][i - 1]) if i else call
                calls[-1].append(_shared(call, calls[-2][i]) if batch else call)
                walk.answer(with_hidden_output(form, entering))
    return None if states is None else Replay(batches, calls, states, isinstance(form, tuple))


def _replayable_form(weights: Weights, shell: PreTrainedModel, tokens: Tensor) -> Any | None:
    """What block 0 returns for `tokens` [1, length], as the form of all outputs; None if replay would be wrong.

    Two forwards of one sequence get different made-up outputs from every block; see the module's docstring.
    """
    n_blocks = len(weights.blocks)
    with _walking(shell, tokens, n_blocks) as still, _walking(shell, tokens, n_blocks) as moved:
        with weights.block(0) as block, evaluating(block), torch.no_grad():
            args, kwargs = still.call
            form = block(*args, **kwargs)
        for i in range(n_blocks):
            if not _same(_comparable(still.call), _comparable(moved.call)):
                return None
            answers = hidden_input(still.call), (hidden_input(moved.call) + i + 1).sin()
            # Clones, so that a forward which changes an answer in place is noticed.
            still.answer(with_hidden_output(form, answers[0].clone()))
            moved.answer(with_hidden_output(_changed(form), answers[1].clone()))
            if i < n_blocks - 1 and not _same((hidden_input(still.call), hidden_input(moved.call)), answers):
                return None
    return form


@contextmanager
def _walking(shell: PreTrainedModel, tokens: Tensor, n_blocks: int) -> Iterator[_Walk]:
    walk = _Walk(shell, tokens, n_blocks)
    try:
        walk.arrive()
        yield walk
    finally:
        walk.leave()


def hidden_input(call: Call) -> Tensor:
    """The hidden states among a block's arguments: the first positional one, or the keyword `hidden_states`."""
    args, kwargs = call
    states = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(states, Tensor):
        raise UnsupportedModelError("The model's blocks take no hidden states as their first argument.")
    return states


def with_hidden_input(call: Call, states: Tensor | None) -> Call:
    """The arguments with other hidden states."""
    args, kwargs = call
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


def hidden_output(output: Any) -> Tensor:
    """The hidden states in a block's output: the output itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden_output(output: Any, states: Tensor | None) -> Any:
    """The output with other hidden states."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


def _changed(value: Any) -> Any:
    """A block's output with other values in all its tensors."""
    if isinstance(value, tuple):
        return tuple(_changed(item) for item in value)
    return value + 1 if isinstance(value, Tensor) else value


def _comparable(call: Call) -> tuple[Any, ...]:
    args, kwargs = with_hidden_input(call, None)
    return (args, *sorted(kwargs.items(), key=lambda item: item[0]))


def _same(a: Any, b: Any) -> bool:
    """Whether two values are equal bit for bit and of a kind through which blocks cannot talk to each other."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is tuple and type(b) is tuple:
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, _PLAIN) and type(a) is type(b) and a == b


def _shared(new: Any, old: Any) -> Any:
    """`new` with every tensor that equals its counterpart in `old`, strides included, replaced by that one."""
    if isinstance(new, Tensor):
        alike = isinstance(old, Tensor) and new.stride() == old.stride() and _same(new, old)
        return old if alike else new
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return tuple(map(_shared, new, old))
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: _shared(value, old.get(key)) for key, value in new.items()}
    return new
