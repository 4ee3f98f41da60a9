import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layershare.errors import LayershareError
from layershare.model.layers import FactorLinear, SharedBasis, Side

D_IN, D_OUT, RANK = 12, 20, 5
SIDES: list[Side] = ["input", "output"]


def group(side: Side, *, bias: bool = True, conv1d: bool = False, members: int = 2) -> list[FactorLinear]:
    torch.manual_seed(0)
    layers: list[FactorLinear] = []
    for _ in range(members):
        layers.append(FactorLinear(D_IN, D_OUT, RANK, bias, side, conv1d, owner=layers[0] if layers else None))
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.normal_()
    return layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("conv1d", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_forward_weight_and_dense_agree(side, conv1d, bias):
    x = torch.randn(3, 4, D_IN)
    for layer in group(side, bias=bias, conv1d=conv1d):
        weight = layer.weight if conv1d else layer.weight.T
        assert layer.weight.shape == ((D_IN, D_OUT) if conv1d else (D_OUT, D_IN))
        expected = x @ weight + (layer.bias if layer.bias is not None else 0)
        torch.testing.assert_close(layer(x), expected)
        if conv1d and not bias:
            continue  # every Conv1D has a bias
        dense = layer.to_dense()
        assert type(dense) is (Conv1D if conv1d else nn.Linear)
        assert dense.weight.is_contiguous()
        torch.testing.assert_close(dense(x), expected)


@pytest.mark.parametrize("side", SIDES)
def test_owner_layout(side):
    owner, member = group(side)
    assert list(owner.state_dict()) == ["bias", "coef.weight", "basis.weight"]
    assert list(member.state_dict()) == ["bias", "coef.weight"]
    shapes = {"input": ((RANK, D_IN), (D_OUT, RANK)), "output": ((D_OUT, RANK), (RANK, D_IN))}
    assert (owner.basis.weight.shape, owner.coef.weight.shape) == shapes[side]
    assert isinstance(owner.basis, SharedBasis)
    assert owner.basis in member.parts()
    assert "owner" in repr(owner)
    assert "member" in repr(member)


def test_the_basis_is_looked_up_when_called():
    owner, member = group("input")
    owner.basis = nn.Linear(D_IN, RANK, bias=False)
    assert owner.basis in member.parts()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_the_link_and_are_independent(clone):
    layers = nn.ModuleList(group("output"))
    copied = clone(layers)
    assert copied[0].basis is copied[1].parts()[1]
    assert copied[0].basis is not layers[0].basis
    x = torch.randn(2, D_IN)
    assert torch.equal(copied[1](x), layers[1](x))


@pytest.mark.parametrize("side", SIDES)
def test_the_basis_gets_the_sum_of_its_members_gradients(side):
    layers = group(side, members=3)
    x = torch.randn(7, D_IN)
    alone = []
    for layer in layers:
        layer(x).square().sum().backward()
        alone.append(layers[0].basis.weight.grad)
        layers[0].basis.weight.grad = None
    torch.stack([layer(x).square().sum() for layer in layers]).sum().backward()
    torch.testing.assert_close(layers[0].basis.weight.grad, sum(alone))


def test_new_factors_do_not_touch_the_random_state_and_can_be_meta():
    before = torch.get_rng_state()
    layer = FactorLinear(D_IN, D_OUT, RANK, True, "input", device="meta", dtype=torch.bfloat16)
    assert torch.equal(before, torch.get_rng_state())
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert layer.weight.is_meta
    with pytest.raises(LayershareError, match="offloaded"):
        layer.to_dense()


def test_half_precision_product_is_rounded_once():
    layer = group("input", members=1)[0].to(torch.bfloat16)
    exact = layer.coef.weight.double() @ layer.basis.weight.double()
    assert torch.equal(layer.to_dense().weight, exact.float().to(torch.bfloat16))


def test_unknown_side():
    with pytest.raises(LayershareError, match=r"Unknown side 'inputs'. Did you mean 'input'\?"):
        FactorLinear(D_IN, D_OUT, RANK, True, "inputs")  # pyright: ignore[reportArgumentType]
