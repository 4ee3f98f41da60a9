"""What stands where a sub-layer was dropped: modules without weights, whose output leaves the residual as it was."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class DroppedLinear(nn.Module):
    """A linear of a dropped MLP: `[..., d_in]` to zeros `[..., width]`.

    Those that read the residual have width 0, so that nothing is computed between them and the one that writes it.
    """

    def __init__(self, dense: nn.Linear | Conv1D, width: int) -> None:
        super().__init__()
        self.width = width
        self.conv1d = isinstance(dense, Conv1D)
        self.shape = tuple(dense.weight.shape)
        self.biased = dense.bias is not None
        self.dtype = dense.weight.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zeros."""
        return x.new_zeros(*x.shape[:-1], self.width)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, all zero, for model code that reads it; marked so that GPT-2 does not initialise it."""
        weight = torch.zeros(self.shape, dtype=self.dtype)
        weight._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        return weight

    def to_dense(self, device: torch.device, dtype: torch.dtype) -> nn.Linear | Conv1D:
        """The ordinary layer that computes the same: all its weights are zero."""
        with torch.device("meta"):
            dense = Conv1D(*self.shape[::-1]) if self.conv1d else nn.Linear(*self.shape[::-1], bias=self.biased)
        return zeroed(dense.to(dtype), device)

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return f"dropped, was {self.shape}"


def drop_mlp(parent: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear | Conv1D]:
    """Replace the linears of an MLP, of these names in `parent`, the one that writes last; returns what they were."""
    dense = {name: cast(nn.Linear | Conv1D, parent.get_submodule(name)) for name in names}
    for name, module in dense.items():
        d_out = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
        parent.set_submodule(name, DroppedLinear(module, d_out if name == names[-1] else 0))
    return dense


class DroppedAttention(nn.Module):
    """A dropped attention: zeros, or the residual where the family's attention adds that itself (Bloom).

    The cache gets one zero per token for its layer, so that its length stays right: positions and masks of further
    tokens are made from it, and a cache counts a layer without elements as empty. Attentions of transformers return a
    pair.
    """

    def __init__(self, dense: nn.Module, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self._signature = inspect.signature(dense.forward)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """The arguments of the dense attention; returns (output, None for the attention weights)."""
        given = self._signature.bind(*args, **kwargs).arguments
        states = given["hidden_states"]
        cache = given.get("past_key_values", given.get("layer_past"))
        if cache is not None:
            nothing = states.new_zeros(states.shape[0], 1, states.shape[1], 1)
            cache.update(nothing, nothing, self.layer)
        residual = given.get("residual")
        return (torch.zeros_like(states) if residual is None else residual), None

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return "dropped"


def zeroed(module: Any, device: torch.device) -> Any:
    """A module built on the meta device, on `device` and with all its tensors zero."""
    module = module.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.zero_()
    return module
