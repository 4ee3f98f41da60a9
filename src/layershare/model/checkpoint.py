"""The safetensors format: exact sizes beforehand, and a writer that never holds more than one tensor in memory."""

import json
import os
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from layershare.store import write_json

Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of every tensor of a file, by name."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How safetensors names the dtypes."""
Read = Callable[[str], Tensor]
"""Gives a tensor by its name in the checkpoint."""


def header_bytes(tensors: Tensors) -> bytes:
    """The header of a safetensors file that holds these tensors in this order: JSON, padded to eight bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in tensors.items():
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def file_bytes(tensors: Tensors) -> int:
    """Size in bytes of a safetensors file that holds these tensors: length field, header, data."""
    data = sum(prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
    return 8 + len(header_bytes(tensors)) + data


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
                file.write(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
