import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layershare.errors import LayershareError
from layershare.model.composition import Composition, Member, Side, deltas, shared
from layershare.model.layers import ComposedLinear, SharedLinear

D_IN, D_OUT, RANK = 12, 20, 5
SIDES: list[Side] = ["input", "output"]


def layers_of(composition: Composition, bias: bool = True, **options: Any) -> list[Any]:
    """The layers of a composition, with random numbers in them."""
    torch.manual_seed(0)
    layers: list[ComposedLinear] = []
    for name in composition.names:
        layers.append(ComposedLinear(composition, name, bias, home=layers[0] if layers else None, **options))
    fill(nn.ModuleList(layers))
    return layers


@torch.no_grad()
def fill(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.normal_()
    for order in module.buffers():
        order.copy_(torch.randperm(len(order)))


def members_of(count: int, conv1d: bool) -> list[Member]:
    return [Member(f"layers.{i}.up", D_IN, D_OUT, conv1d) for i in range(count)]


def group(
    side: Side, *, conv1d: bool = False, members: int = 2, private: int = 0, pivot: bool = False, **options: Any
) -> list[Any]:
    return layers_of(shared(members_of(members, conv1d), RANK, side, private, pivot), **options)


def anchored(*, conv1d: bool = False, mean: bool = False, **options: Any) -> list[Any]:
    """An anchor, with a delta of its own if the shared weight is a `mean`, and two layers with deltas to it."""
    members = members_of(3, conv1d)
    own = [member.name for member in members[0 if mean else 1 :]]
    return layers_of(deltas(members, RANK, own), **options)


def check_forward_weight_and_dense(layer: ComposedLinear, bias: bool, conv1d: bool) -> None:
    """They agree; the weight that model code reads is no parameter."""
    x = torch.randn(3, 4, D_IN)
    weight = layer.weight if conv1d else layer.weight.T
    assert layer.weight.shape == ((D_IN, D_OUT) if conv1d else (D_OUT, D_IN))
    assert not any(layer.weight is parameter for parameter in layer.parameters())
    expected = x @ weight + (layer.bias if layer.bias is not None else 0)
    torch.testing.assert_close(layer(x), expected)
    if conv1d and not bias:
        return  # every Conv1D has a bias
    dense = layer.to_dense()
    assert type(dense) is (Conv1D if conv1d else nn.Linear)
    assert dense.weight.is_contiguous()
    torch.testing.assert_close(dense(x), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("conv1d", [True, False])
@pytest.mark.parametrize(("pivot", "private"), [(False, 0), (True, 0), (False, 3), (True, 3)])
@pytest.mark.parametrize("side", SIDES)
def test_forward_weight_and_dense_agree(side, pivot, private, conv1d, bias):
    for layer in group(side, bias=bias, conv1d=conv1d, pivot=pivot, private=private):
        check_forward_weight_and_dense(layer, bias, conv1d)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("conv1d", [True, False])
@pytest.mark.parametrize("mean", [True, False])
def test_forward_weight_and_dense_of_deltas_agree(mean, conv1d, bias):
    for layer in anchored(bias=bias, conv1d=conv1d, mean=mean):
        check_forward_weight_and_dense(layer, bias, conv1d)


def test_a_delta_is_added_to_the_anchors_weight():
    anchor, member, _ = anchored(bias=False)
    x = torch.randn(7, D_IN)
    low_rank = member.down.weight.T @ member.up.weight.T  # A B, A: d_in × r, B: r × d_out
    torch.testing.assert_close(member(x), x @ (anchor.base.weight.T + low_rank))
    torch.testing.assert_close(anchor(x), x @ anchor.base.weight.T)


@pytest.mark.parametrize("mean", [True, False])
def test_anchor_layout(mean):
    anchor, member, _ = anchored(mean=mean)
    delta = ["down.weight", "up.weight"]
    assert list(anchor.state_dict()) == ["bias", "base.weight", *(delta if mean else [])]
    assert list(member.state_dict()) == ["bias", *delta]
    assert (member.down.weight.shape, member.up.weight.shape) == ((RANK, D_IN), (D_OUT, RANK))
    assert isinstance(anchor.base, SharedLinear)
    assert f"12 -> 20, base(x){' + up(down(x))' if mean else ''}" in repr(anchor)
    assert "12 -> 20, layers.0.up.base(x) + up(down(x))" in repr(member)


@pytest.mark.parametrize("side", SIDES)
def test_owner_layout(side):
    owner, member = group(side)
    assert set(owner.state_dict()) == {"bias", "coef.weight", "basis.weight"}
    assert list(member.state_dict()) == ["bias", "coef.weight"]
    shapes = {"input": ((RANK, D_IN), (D_OUT, RANK)), "output": ((D_OUT, RANK), (RANK, D_IN))}
    assert (owner.basis.weight.shape, owner.coef.weight.shape) == shapes[side]
    assert isinstance(owner.basis, SharedLinear)
    assert owner.basis in member.parts()
    assert f"12 -> 20, {'coef(basis(x))' if side == 'input' else 'basis(coef(x))'}" in repr(owner)
    assert "layers.0.up.basis(" in repr(member)


@pytest.mark.parametrize("side", SIDES)
def test_private_directions_are_each_layers_own(side):
    owner, member = group(side, private=3)
    assert set(owner.state_dict()) == {"bias", "coef.weight", "basis.weight", "own.weight", "private.weight"}
    assert set(member.state_dict()) == {"bias", "coef.weight", "own.weight", "private.weight"}
    assert (member.own.weight.shape, member.private.weight.shape) == ((3, D_IN), (D_OUT, 3))
    assert repr(member).startswith("ComposedLinear(\n  12 -> 20, ")
    assert " + private(own(x))" in repr(member)


@pytest.mark.parametrize("side", SIDES)
def test_a_pivoted_basis_stores_t_and_an_order(side):
    owner, member = group(side, pivot=True)
    assert set(owner.state_dict()) == {"bias", "coef.weight", "basis.weight", "basis_order"}
    assert list(member.state_dict()) == ["bias", "coef.weight"]
    shapes = {"input": ((RANK, D_IN - RANK), (D_IN,)), "output": ((D_OUT - RANK, RANK), (D_OUT,))}
    assert (owner.basis.weight.shape, owner.basis_order.shape) == shapes[side]
    x, order = torch.randn(3, D_IN if side == "input" else RANK), owner.basis_order.long()
    basis = owner.product(tuple(f for f in owner.factors if f.home), wide=True).T
    if side == "input":
        assert torch.equal(basis[order[:RANK]], torch.eye(RANK))
        assert torch.equal(basis[order[RANK:]], owner.basis.weight.T)
    else:
        expected = torch.cat((x, x @ owner.basis.weight.T), 1)
        torch.testing.assert_close(x @ basis, expected[:, order])
    half = copy.deepcopy(owner).to(torch.bfloat16)
    assert torch.equal(half.basis_order, owner.basis_order)


def test_the_basis_is_looked_up_when_called():
    owner, member = group("input")
    owner.basis = nn.Linear(D_IN, RANK, bias=False)
    assert owner.basis in member.parts()
    anchor, delta, _ = anchored()
    anchor.base = nn.Linear(D_IN, D_OUT, bias=False)
    assert anchor.base in delta.parts()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_the_link_and_are_independent(clone):
    x = torch.randn(2, D_IN)
    for layers, what in ((group("output"), "basis"), (group("input", pivot=True), "basis"), (anchored(), "base")):
        copied = clone(nn.ModuleList(layers))
        assert getattr(copied[0], what) in copied[1].parts()
        assert getattr(copied[0], what) is not getattr(layers[0], what)
        assert torch.equal(copied[1](x), layers[1](x))


@pytest.mark.parametrize(
    ("layers", "what"),
    [
        *((group(side, members=3, pivot=pivot), "basis") for side in SIDES for pivot in (False, True)),
        *((anchored(mean=mean), "base") for mean in (False, True)),
    ],
)
def test_what_is_shared_gets_the_sum_of_its_users_gradients(layers, what):
    weight = getattr(layers[0], what).weight
    x = torch.randn(7, D_IN)
    alone = []
    for layer in layers:
        layer(x).square().sum().backward()
        alone.append(weight.grad)
        weight.grad = None
    torch.stack([layer(x).square().sum() for layer in layers]).sum().backward()
    torch.testing.assert_close(weight.grad, sum(alone))


def test_new_layers_do_not_touch_the_random_state_and_can_be_meta():
    before = torch.get_rng_state()
    place: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    compositions = shared(members_of(1, False), RANK, "input"), deltas(members_of(2, False), RANK, ["layers.1.up"])
    layers: list[ComposedLinear] = []
    for each in compositions:
        home = None
        for name in each.names:
            layers.append(ComposedLinear(each, name, True, home=home, **place))
            home = layers[-1]
    for layer in layers:
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
        assert layer.weight.is_meta
        with pytest.raises(LayershareError, match="offloaded"):
            layer.to_dense()
    assert torch.equal(before, torch.get_rng_state())


def test_half_precision_product_is_rounded_once():
    layer = group("input", members=1)[0].to(torch.bfloat16)
    exact = layer.coef.weight.double() @ layer.basis.weight.double()
    assert torch.equal(layer.to_dense().weight, exact.float().to(torch.bfloat16))
    anchor, delta, _ = (each.to(torch.bfloat16) for each in anchored())
    exact = anchor.base.weight.double() + delta.up.weight.double() @ delta.down.weight.double()
    torch.testing.assert_close(delta.to_dense().weight, exact.float().to(torch.bfloat16))
    assert torch.equal(anchor.to_dense().weight, anchor.base.weight)


def test_unknown_side():
    with pytest.raises(LayershareError, match=r"Unknown side 'inputs'. Did you mean 'input'\?"):
        shared(members_of(1, False), RANK, "inputs")  # pyright: ignore[reportArgumentType]
