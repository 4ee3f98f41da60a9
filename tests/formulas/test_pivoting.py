import pytest
import torch
from torch import Tensor

from layershare.formulas.linalg import Factors, pivot_factors, pivoted

D, K = 24, 7


def bases() -> dict[str, Tensor]:
    torch.manual_seed(0)
    plain = torch.randn(D, K, dtype=torch.float64)
    axes = torch.eye(D, dtype=torch.float64)[:, 5 : 5 + K]
    powers = 10.0 ** torch.linspace(-150, 150, K, dtype=torch.float64)
    return {
        "random": plain,
        "columns of very different sizes": plain * powers,
        "rows of very different sizes": plain * 10.0 ** torch.linspace(-12, 12, D, dtype=torch.float64)[:, None],
        "of rank 3": plain[:, :3] @ torch.randn(3, K, dtype=torch.float64),
        "of rank 1, with columns of zeros": plain[:, :1] * torch.tensor([0, 1, 0, 2, 0, 0, 3.0]),
        "nearly of rank 3": plain[:, :3] @ torch.randn(3, K, dtype=torch.float64) + 1e-13 * plain,
        "zero": torch.zeros(D, K, dtype=torch.float64),
        "axes": axes,
        "equal rows": plain[:1].expand(D, K) + 0.0,
        "of one column": plain[:, :1],
        "all rows but one": torch.randn(D, D - 1, dtype=torch.float64),
        "single precision": plain.float(),
    }


@pytest.mark.parametrize("name", bases())
def test_any_basis_is_pivots_and_the_other_rows(name):
    basis = bases()[name]
    rest, order, mixing = pivoted(basis)
    d, k = basis.shape
    assert (rest.shape, mixing.shape) == ((d - k, k), (k, k))
    assert sorted(order.tolist()) == list(range(d))
    again = torch.empty(d, k, dtype=torch.float64)
    again[order] = torch.cat((torch.eye(k, dtype=torch.float64), rest)) @ mixing
    error = (again - basis.double()).abs().amax(0)  # of every column, by its own size
    assert (error <= 1e-12 * basis.double().abs().amax(0)).all()
    assert torch.equal(mixing, basis.double()[order[:k]])
    assert rest.abs().max() < 30


def test_pivots_come_by_size():
    basis = torch.randn(D, K, dtype=torch.float64)
    _, order, _ = pivoted(basis)
    first = torch.linalg.qr(basis).Q.square().sum(1).argmax()
    assert order[0] == first


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("name", bases())
def test_the_products_of_a_group_stay_what_they_are(name, side):
    basis = bases()[name]
    d, k = basis.shape
    sizes = basis.double().abs().amax(0).clamp(1e-300)[:, None]
    coefs = tuple(torch.randn(k, 11, dtype=torch.float64) / sizes for _ in "ab")
    x = torch.randn(5, d if side == "input" else 11, dtype=torch.float64)
    if side == "input":
        made = pivot_factors(Factors(basis, coefs, 0.0), side)
        z = x[:, made.order][:, :k] + x[:, made.order][:, k:] @ made.basis
        outputs, expected = [z @ c for c in made.coefs], [x @ basis.double() @ c for c in coefs]
    else:
        made = pivot_factors(Factors(basis.T, tuple(c.T for c in coefs), 0.0), side)
        zs = [x @ c for c in made.coefs]
        outputs = [torch.cat((z, z @ made.basis), 1)[:, made.order] for z in zs]
        expected = [x @ c.T @ basis.double().T for c in coefs]
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
