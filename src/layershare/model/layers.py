"""Linear layers that are composed: sums of products of factors, some of which several layers share.

The first member of a composition registers what is shared as a child; the others hold an unregistered reference to
it and look the child up when they are called. So it is one parameter, stored once, and whatever wraps it (PEFT,
accelerate, FSDP) is seen by every layer. All children are `nn.Linear`, which other libraries know.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layershare.errors import LayershareError
from layershare.formulas.quantize import dense_weight
from layershare.model.composition import Composition, Factor, Side, Storage


def unpivoted(weight: torch.Tensor, order: torch.Tensor, side: Side) -> torch.Tensor:
    """The matrix of a factor that is pivoted on a side, `[out, in]`, from T and its order."""
    dim = -1 if side == "input" else 0  # along which the identity stands beside T
    identity = torch.eye(weight.shape[dim + 1], dtype=weight.dtype, device=weight.device)
    return torch.cat((identity, weight), dim).index_select(dim, order if dim == 0 else order.argsort())


class SharedLinear(nn.Linear):
    """What several layers share: a class of its own, so that FSDP wrap policies can name it."""


class QuantizedLinear(nn.Linear):
    """A linear without bias whose weight is stored as codes and scales; each call makes the weight of them anew.

    The weight is no parameter: it does not train. The tensors are left uninitialised. `like`, an empty one that is not
    saved, has the dtype that the weight is to be of, which may be that of no other.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        storage: Storage,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # `nn.Linear`'s would make the weight
        self.in_features, self.out_features, self.storage = in_features, out_features, storage
        self.register_parameter("bias", None)
        for name, (shape, own) in storage.tensors(out_features, in_features).items():
            tensor = torch.empty(shape, device=device, dtype=getattr(torch, own) if own else dtype)
            self.register_buffer(name, tensor)
        self.register_buffer("like", torch.empty(0, device=device, dtype=dtype), persistent=False)

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors that the weight is made of."""
        return {name: self.get_buffer(name) for name in self.storage.tensors(self.out_features, self.in_features)}

    @property
    def weight(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight, `[out, in]`, marked as initialised; see `ComposedLinear.weight`."""
        weight = dense_weight(self.stored, self.storage, self.in_features, self.get_buffer("like").dtype)
        weight._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        return weight

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        return f"{self.in_features} -> {self.out_features}, {self.storage}"


class SharedQuantizedLinear(QuantizedLinear, SharedLinear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """The same, shared."""


PARTS = (nn.Linear, SharedLinear, QuantizedLinear, SharedQuantizedLinear)
"""What the factors of a layer are."""


def made_part(factor: Factor, columns: int, rows: int, **place: Any) -> nn.Linear:
    """The linear that a factor is, on a `device` and of a `dtype`, uninitialised."""
    if factor.storage is not None:
        return (SharedQuantizedLinear if factor.home else QuantizedLinear)(columns, rows, factor.storage, **place)
    kind = SharedLinear if factor.home else nn.Linear
    # Built on meta and then allocated: nothing is drawn from the random number generator.
    part = kind(columns, rows, bias=False, device="meta", dtype=place["dtype"])
    return part.to_empty(device=place["device"])


class ComposedLinear(nn.Module):
    """The member of a composition with that name: y = Σ_terms f_m(… f_1(x)) + b.

    `bias` `[d_out]` is the dense layer's own, under its own name. `home` is the composition's first member, for all
    others. The tensors are left uninitialised.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        composition: Composition,
        name: str,
        bias: bool,
        *,
        home: ComposedLinear | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        device = device or torch.get_default_device()
        self.composition = composition
        self.member = composition.members[composition.names.index(name)]
        self.terms = composition.terms_of(name)
        self.in_features, self.out_features = self.member.d_in, self.member.d_out
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        )
        for factor in self.factors:
            if factor.registered_by(self.member):
                rows, columns = factor.shape(self.member)
                self.add_module(factor.name, made_part(factor, columns, rows, device=device, dtype=dtype))
                if factor.pivots:
                    order = torch.empty(rows + columns, dtype=torch.int32, device=device)
                    self.register_buffer(factor.order, order)
        # nn.Module registers a module that is an attribute, but not one inside a tuple.
        self._home: tuple[ComposedLinear, ...] = () if home is None else (home,)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The factors that it multiplies with."""
        return tuple(factor for term in self.terms for factor in term.factors)

    @property
    def coefficients(self) -> tuple[Factor, ...]:
        """Of each product the last factor that is this layer's own; the last of all if it is no product."""
        products = (term.factors for term in self.terms if len(term.factors) > 1)
        own = ([factor for factor in factors if factor.home is None] for factors in products)
        return tuple(factors[-1] for factors in own) or self.factors[-1:]

    @property
    def coefficient(self) -> nn.Linear:
        """One of the parts that it registers: where the layer is, and in what dtype."""
        return self.part(self.coefficients[0])

    def part(self, factor: Factor) -> nn.Linear:
        """The linear that a factor is."""
        return getattr(self._registering(factor), factor.name)

    def order(self, factor: Factor) -> torch.Tensor:
        """The order of a pivoted factor, `[d]`."""
        return getattr(self._registering(factor), factor.order)

    def _registering(self, factor: Factor) -> ComposedLinear:
        return self if factor.registered_by(self.member) else self._home[0]

    def parts(self) -> tuple[nn.Linear, ...]:
        """The linears that it is made of, its own and those that it shares, in the order of its factors."""
        return tuple(map(self.part, self.factors))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., d_in]` to `[..., d_out]`."""
        total = None
        for term in self.terms:
            y = x
            for factor in term.factors:
                y = self._multiplied(factor, y)
            y = y.to(x.device)  # a model split over devices may keep what is shared on another one than this layer
            total = y if total is None else total + y
        assert total is not None
        return total if self.bias is None else total + self.bias

    def _multiplied(self, factor: Factor, x: torch.Tensor) -> torch.Tensor:
        """What a factor makes of x."""
        part = self.part(factor)
        if factor.pivots is None:
            return part(x)
        order = self.order(factor).to(x.device)
        if factor.pivots == "input":
            rank = factor.outward
            x = x.index_select(-1, order)
            return x[..., :rank] + part(x[..., rank:]).to(x.device)
        return torch.cat((x, part(x).to(x.device)), -1).index_select(-1, order)

    def product(self, factors: tuple[Factor, ...], *, wide: bool) -> torch.Tensor:
        """The matrix of a product of factors, `[out, in]`, on `coefficient`'s device; `wide`: float32 or better."""
        place, dtype = self.coefficient.weight.device, self.coefficient.weight.dtype
        dtype = torch.promote_types(dtype, torch.float32) if wide else dtype
        weights = []
        for factor in factors:
            weight = self.part(factor).weight.to(place, dtype)
            if factor.pivots:
                weight = unpivoted(weight, self.order(factor).to(place), factor.pivots)
            weights.append(weight)
        return reduce(lambda inner, outer: outer @ inner, weights)

    def matrix(self, *, wide: bool) -> torch.Tensor:
        """The weight that all factors make, `[d_out, d_in]`, as `product`."""
        first, *others = (self.product(term.factors, wide=wide) for term in self.terms)
        total = sum(others, start=first)
        # A view, where it is a parameter: what is done to a weight that is read must not be done to that.
        return total.view_as(total)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, `[d_out, d_in]` (`[d_in, d_out]` for Conv1D), for model code that reads `.weight`.

        It is marked as initialised: GPT-2 re-initialises its output projections through this name after loading.
        """
        weight = self.matrix(wide=False)
        weight = weight.T if self.member.conv1d else weight
        weight._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        return weight

    def require_plain_parts(self) -> None:
        """Raise `LayershareError` where a part is wrapped (an adapter that is not merged) or offloaded."""
        for part in self.parts():
            if type(part) not in PARTS:
                raise LayershareError("A factor carries an adapter: merge or unload the adapters first.")
            if part.weight.is_meta:
                raise LayershareError("Weights are offloaded: load the model without a device map for this.")

    @torch.no_grad()
    def to_dense(self) -> nn.Linear | Conv1D:
        """The ordinary layer that computes the same: its weight is formed in float32 or better and rounded once.

        Raises as `require_plain_parts`.
        """
        self.require_plain_parts()
        own, matrix = self.coefficient.weight, self.matrix(wide=True)
        with torch.device("meta"):
            if self.member.conv1d:
                dense = Conv1D(self.out_features, self.in_features)
            else:
                dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        matrix = matrix.T.contiguous() if self.member.conv1d else matrix
        trains = own.requires_grad or isinstance(self.coefficient, QuantizedLinear)  # which has no parameter to say so
        dense.weight = nn.Parameter(matrix.to(own.dtype), requires_grad=trains)
        if self.bias is not None:
            dense.bias = self.bias
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer: `32 -> 56, coef(layers.0.mlp.up_proj.basis(x))`."""
        shown = []
        for term in self.terms:
            names = (
                each.name if each.registered_by(self.member) else f"{each.home}.{each.name}" for each in term.factors
            )
            shown.append(reduce(lambda inner, name: f"{name}({inner})", names, "x"))
        return f"{self.in_features} -> {self.out_features}, {' + '.join(shown)}"
