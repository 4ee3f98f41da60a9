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

from typing import Any, Protocol

from torch import Tensor

from layershare.calibrate.drivers.calls import Call


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
