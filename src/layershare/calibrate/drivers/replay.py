"""Record and replay: the recorded arguments of each batch and block, with the hidden states put in."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from layershare.calibrate.drivers.batches import Batches
from layershare.calibrate.drivers.calls import Call, hidden_input, with_hidden_input, with_hidden_output
from layershare.calibrate.drivers.walk import parking, walking
from layershare.errors import UnsupportedModelError
from layershare.model.modes import evaluating
from layershare.model.weights import Weights

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class Replay:
    """The driver that knows all arguments but the hidden states from the start."""

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


def record(weights: Weights, batches: Batches) -> Replay | None:
    """Record the arguments of all blocks for all batches; None if the model cannot be replayed."""
    shell, n_blocks = parking(weights), len(weights.blocks)
    form = _replayable_form(weights, shell, batches.tokens[:1].to(weights.device))
    if form is None:
        return None
    states: Tensor | None = None
    calls: list[list[Call]] = []
    for batch in range(len(batches)):
        with walking(shell, batches.rows(batches.tokens, batch).to(weights.device), n_blocks) as walk:
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
    with walking(shell, tokens, n_blocks) as still, walking(shell, tokens, n_blocks) as moved:
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
