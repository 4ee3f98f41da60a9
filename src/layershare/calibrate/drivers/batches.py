"""The text in batches, and the room for its hidden states."""

import math
import os
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor

from layershare.disk import require_disk, writing

Part = tuple[int, slice]
"""The number of a batch, and rows of it."""


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

    def split(self, first: int) -> tuple[list[Part], list[Part]]:
        """The first so many rows, and the others, as parts of batches."""
        sizes = [len(self.rows(self.tokens, batch)) for batch in range(len(self))]
        ends = [min(max(first - batch * self.size, 0), size) for batch, size in enumerate(sizes)]
        front = [(batch, slice(end)) for batch, end in enumerate(ends) if end > 0]
        return front, [(batch, slice(end, None)) for batch, end in enumerate(ends) if end < sizes[batch]]

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
