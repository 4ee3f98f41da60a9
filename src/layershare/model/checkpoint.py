"""Write a safetensors checkpoint tensor by tensor, so that no more than one tensor of it is ever in memory."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from layershare.plan.budget import Tensors, header_bytes
from layershare.store import write_json

Read = Callable[[str], Tensor]
"""Gives a tensor by its name in the checkpoint."""


def write_checkpoint(folder: Path, tensors: Tensors, read: Read, max_shard_size: str | int = "5GB") -> None:
    """Write `model.safetensors`, or shards of at most `max_shard_size` and their index, into `folder`.

    `tensors` says what to write, `read` is called once for each, in order. Raises `ValueError` if it gives another
    shape or dtype than announced.
    """
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in tensors.items()}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        _write_file(folder / file, {name: tensors[name] for name in names}, read)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _write_file(path: Path, tensors: Tensors, read: Read) -> None:
    header = header_bytes(tensors)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)))
        file.write(header)
        for name, (shape, dtype) in tensors.items():
            tensor = read(name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype} is not {shape} {dtype}")
            if tensor.numel():
                tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().tofile(file)
        file.flush()
        os.fsync(file.fileno())
