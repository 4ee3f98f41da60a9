"""Factored linear layers: a basis that a group of layers shares, and coefficients of each layer's own.

The first member of a group (its owner) registers the basis as a child; the others hold an unregistered reference
to the owner and look the basis up when they are called. So a basis is one parameter, stored once, and whatever
wraps it (PEFT, accelerate, FSDP) is seen by every member. Both factors are `nn.Linear`, which other libraries know.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layershare.errors import LayershareError, unknown

Side = Literal["input", "output"]
SIDES: tuple[Side, ...] = ("input", "output")


class SharedBasis(nn.Linear):
    """The factor that the members of a group share; a class of its own so that FSDP wrap policies can name it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)


class FactorLinear(nn.Module):
    """A linear layer as the product of a shared basis and its own coefficients.

    side "input":  `y = coef(basis(x)) + bias`; basis `[rank, d_in]` shared, coef `[d_out, rank]` private.
    side "output": `y = basis(coef(x)) + bias`; coef `[rank, d_in]` private, basis `[d_out, rank]` shared.

    (Weight shapes as `nn.Linear` stores them.) `bias` `[d_out]` is the dense layer's own, under its own name. With
    `owner` the layer is a later member of that owner's group, without it the first. `conv1d` says that the dense
    layer is a transformers `Conv1D`, whose weight is `[d_in, d_out]`. The tensors are left uninitialised.

    Raises `LayershareError` for an unknown side.
    """

    basis: nn.Linear
    coef: nn.Linear
    bias: nn.Parameter | None

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        bias: bool,
        side: Side,
        conv1d: bool = False,
        *,
        owner: FactorLinear | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if side not in SIDES:
            raise unknown("side", side, SIDES)
        self.in_features, self.out_features, self.rank = d_in, d_out, rank
        self.side, self.conv1d = side, conv1d
        device = device or torch.get_default_device()
        inward, outward = (d_in, rank), (rank, d_out)
        shared, private = (inward, outward) if side == "input" else (outward, inward)
        # Built on meta and then allocated: nothing is drawn from the random number generator.
        self.coef = nn.Linear(*private, bias=False, device="meta", dtype=dtype).to_empty(device=device)
        if owner is None:
            self.basis = SharedBasis(*shared, device="meta", dtype=dtype).to_empty(device=device)
        # nn.Module registers a module that is an attribute, but not one inside a tuple.
        self._owner = () if owner is None else (owner,)
        self.register_parameter("bias", nn.Parameter(torch.empty(d_out, device=device, dtype=dtype)) if bias else None)

    def factors(self) -> tuple[nn.Linear, nn.Linear]:
        """The two factors in the order in which the input meets them."""
        basis = self._owner[0].basis if self._owner else self.basis
        return (basis, self.coef) if self.side == "input" else (self.coef, basis)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., d_in]` to `[..., d_out]`."""
        first, second = self.factors()
        # A model split over devices may keep the basis on another one than this layer.
        y = second(first(x)).to(x.device)
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, `[d_out, d_in]` (`[d_in, d_out]` for Conv1D), for model code that reads `.weight`.

        It is marked as initialised: GPT-2 re-initialises its output projections through this name after loading.
        """
        first, second = self.factors()
        weight = second.weight @ first.weight.to(second.weight.device)
        weight = weight.T if self.conv1d else weight
        weight._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        return weight

    def require_plain_factors(self) -> None:
        """Raise `LayershareError` where a factor is wrapped (an adapter that is not merged) or offloaded."""
        for factor in self.factors():
            if type(factor) not in (nn.Linear, SharedBasis):
                raise LayershareError("A factor carries an adapter: merge or unload the adapters first.")
            if factor.weight.is_meta:
                raise LayershareError("Weights are offloaded: load the model without a device map for this.")

    @torch.no_grad()
    def to_dense(self) -> nn.Linear | Conv1D:
        """The ordinary layer that computes the same: the product is formed in float32 or better and rounded once.

        Raises as `require_plain_factors`.
        """
        self.require_plain_factors()
        first, second = self.factors()
        own = self.coef.weight
        wide = torch.promote_types(own.dtype, torch.float32)
        product = second.weight.to(own.device, wide) @ first.weight.to(own.device, wide)
        with torch.device("meta"):
            if self.conv1d:
                dense = Conv1D(self.out_features, self.in_features)
            else:
                dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        product = product.T.contiguous() if self.conv1d else product
        dense.weight = nn.Parameter(product.to(own.dtype), requires_grad=own.requires_grad)
        if self.bias is not None:
            dense.bias = self.bias
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        role = "member" if self._owner else "owner"
        return f"{self.in_features} -> {self.out_features}, rank={self.rank}, side={self.side}, {role}"
