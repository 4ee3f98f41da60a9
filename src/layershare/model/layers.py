"""Linear layers that share weights: products of a shared basis, and sums of another layer's weight and a delta.

The first layer of those that share (the owner of a basis, the anchor of deltas) registers what is shared as a child;
the others hold an unregistered reference to it and look the child up when they are called. So it is one parameter,
stored once, and whatever wraps it (PEFT, accelerate, FSDP) is seen by every layer. All children are `nn.Linear`, which
other libraries know.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layershare.errors import LayershareError, unknown

Side = Literal["input", "output"]
SIDES: tuple[Side, ...] = ("input", "output")


class SharedLinear(nn.Linear):
    """What several layers share. Its kinds are classes of their own so that FSDP wrap policies can name them."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)


class SharedBasis(SharedLinear):
    """The factor that the members of a group share."""


class SharedDense(SharedLinear):
    """The whole weight that an anchor and the layers with deltas to it share."""


class ComposedLinear(nn.Module):
    """A linear layer made of others, by some formula that its kinds give.

    `bias` `[d_out]` is the dense layer's own, under its own name. `conv1d` says that the dense layer is a transformers
    `Conv1D`, whose weight is `[d_in, d_out]`. The tensors are left uninitialised.
    """

    bias: nn.Parameter | None

    def __init__(
        self, d_in: int, d_out: int, bias: bool, conv1d: bool, device: torch.device | str, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.conv1d = d_in, d_out, conv1d
        self.register_parameter("bias", nn.Parameter(torch.empty(d_out, device=device, dtype=dtype)) if bias else None)

    def parts(self) -> tuple[nn.Linear, ...]:
        """The linears that it is made of, its own and those that it shares."""
        raise NotImplementedError

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The output without the bias, `[..., d_in]` to `[..., d_out]`."""
        raise NotImplementedError

    def matrix(self, *, wide: bool) -> torch.Tensor:
        """The weight that the parts make, `[d_out, d_in]`, on its own part's device; `wide`: float32 or better."""
        raise NotImplementedError

    @property
    def own(self) -> nn.Linear:
        """One of the parts that it registers: where the layer is, and in what dtype."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., d_in]` to `[..., d_out]`."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, `[d_out, d_in]` (`[d_in, d_out]` for Conv1D), for model code that reads `.weight`.

        It is marked as initialised: GPT-2 re-initialises its output projections through this name after loading.
        """
        weight = self.matrix(wide=False)
        weight = weight.T if self.conv1d else weight
        weight._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        return weight

    def require_plain_parts(self) -> None:
        """Raise `LayershareError` where a part is wrapped (an adapter that is not merged) or offloaded."""
        for part in self.parts():
            if type(part) not in (nn.Linear, SharedBasis, SharedDense):
                raise LayershareError("A factor carries an adapter: merge or unload the adapters first.")
            if part.weight.is_meta:
                raise LayershareError("Weights are offloaded: load the model without a device map for this.")

    @torch.no_grad()
    def to_dense(self) -> nn.Linear | Conv1D:
        """The ordinary layer that computes the same: its weight is formed in float32 or better and rounded once.

        Raises as `require_plain_parts`.
        """
        self.require_plain_parts()
        own, matrix = self.own.weight, self.matrix(wide=True)
        with torch.device("meta"):
            if self.conv1d:
                dense = Conv1D(self.out_features, self.in_features)
            else:
                dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        matrix = matrix.T.contiguous() if self.conv1d else matrix
        dense.weight = nn.Parameter(matrix.to(own.dtype), requires_grad=own.requires_grad)
        if self.bias is not None:
            dense.bias = self.bias
        return dense.train(self.training)


class FactorLinear(ComposedLinear):
    """A linear layer as the product of a shared basis and its own coefficients.

    side "input":  `y = coef(basis(x)) + bias`; basis `[rank, d_in]` shared, coef `[d_out, rank]` private.
    side "output": `y = basis(coef(x)) + bias`; coef `[rank, d_in]` private, basis `[d_out, rank]` shared.

    (Weight shapes as `nn.Linear` stores them.) With `owner` the layer is a later member of that owner's group, without
    it the first. Raises `LayershareError` for an unknown side.
    """

    basis: nn.Linear
    coef: nn.Linear

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
        if side not in SIDES:
            raise unknown("side", side, SIDES)
        device = device or torch.get_default_device()
        super().__init__(d_in, d_out, bias, conv1d, device, dtype)
        self.rank, self.side = rank, side
        inward, outward = (d_in, rank), (rank, d_out)
        shared, private = (inward, outward) if side == "input" else (outward, inward)
        # Built on meta and then allocated: nothing is drawn from the random number generator.
        self.coef = nn.Linear(*private, bias=False, device="meta", dtype=dtype).to_empty(device=device)
        if owner is None:
            self.basis = SharedBasis(*shared, device="meta", dtype=dtype).to_empty(device=device)
        # nn.Module registers a module that is an attribute, but not one inside a tuple.
        self._owner = () if owner is None else (owner,)

    def parts(self) -> tuple[nn.Linear, nn.Linear]:
        """The two factors in the order in which the input meets them."""
        basis = self._owner[0].basis if self._owner else self.basis
        return (basis, self.coef) if self.side == "input" else (self.coef, basis)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The second factor of the first of x."""
        first, second = self.parts()
        # A model split over devices may keep the basis on another one than this layer.
        return second(first(x)).to(x.device)

    def matrix(self, *, wide: bool) -> torch.Tensor:
        """The product of the two factors."""
        first, second = (_weight(part, self.own, wide) for part in self.parts())
        return second @ first

    @property
    def own(self) -> nn.Linear:
        """The coefficients."""
        return self.coef

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        role = "member" if self._owner else "owner"
        return f"{self.in_features} -> {self.out_features}, rank={self.rank}, side={self.side}, {role}"


class DeltaLinear(ComposedLinear):
    """A linear layer as a whole weight that several layers share plus a low-rank delta of its own.

    `y = base(x) + up(down(x)) + bias`; base `[d_out, d_in]` shared, down `[rank, d_in]` and up `[d_out, rank]` private.

    (Weight shapes as `nn.Linear` stores them.) Without `anchor` the layer is the anchor itself, which registers the
    base. An anchor of rank 0 has no delta: the base is its weight.
    """

    base: nn.Linear
    down: nn.Linear
    up: nn.Linear

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        bias: bool,
        conv1d: bool = False,
        *,
        anchor: DeltaLinear | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        device = device or torch.get_default_device()
        super().__init__(d_in, d_out, bias, conv1d, device, dtype)
        self.rank = rank
        # Built on meta and then allocated, as factors are.
        if anchor is None:
            self.base = SharedDense(d_in, d_out, device="meta", dtype=dtype).to_empty(device=device)
        if rank:
            self.down = nn.Linear(d_in, rank, bias=False, device="meta", dtype=dtype).to_empty(device=device)
            self.up = nn.Linear(rank, d_out, bias=False, device="meta", dtype=dtype).to_empty(device=device)
        self._anchor = () if anchor is None else (anchor,)

    def parts(self) -> tuple[nn.Linear, ...]:
        """The base and, where there is a delta, its two factors in the order in which the input meets them."""
        base = self._anchor[0].base if self._anchor else self.base
        return (base, self.down, self.up) if self.rank else (base,)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """What the base makes of x, plus what the delta does."""
        base, *delta = self.parts()
        # A model split over devices may keep the base on another one than this layer.
        y = base(x).to(x.device)
        return y + self.up(self.down(x)) if delta else y

    def matrix(self, *, wide: bool) -> torch.Tensor:
        """The base plus the product of the delta's factors."""
        base, *delta = (_weight(part, self.own, wide) for part in self.parts())
        # A view, where there is no delta: what is done to a weight that is read must not be done to the parameter.
        return torch.addmm(base, delta[1], delta[0]) if delta else base.view_as(base)

    @property
    def own(self) -> nn.Linear:
        """The delta's last factor, or the base of an anchor without delta."""
        return self.up if self.rank else self.base

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        role = "delta" if self._anchor else "anchor"
        return f"{self.in_features} -> {self.out_features}, rank={self.rank}, {role}"


def _weight(part: nn.Linear, own: nn.Linear, wide: bool) -> torch.Tensor:
    """A part's weight on the device of the layer's `own` part, in float32 or better if `wide`."""
    dtype = own.weight.dtype
    return part.weight.to(own.weight.device, torch.promote_types(dtype, torch.float32) if wide else dtype)
