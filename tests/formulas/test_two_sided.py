"""Two-sided weighting against brute force, in float64."""

import pytest
import torch

from layershare.formulas.linalg import low_rank, share_and_own, share_input, square_root
from layershare.formulas.two_sided import seen_plainly, seen_through, shrunk


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(width: int, seed: int) -> torch.Tensor:
    rows = drawn(4 * width, width, seed=seed) * torch.logspace(0, -2, width, dtype=torch.float64)
    return rows.T @ rows


def symmetric_root(matrix: torch.Tensor) -> torch.Tensor:
    values, axes = torch.linalg.eigh(matrix)
    return axes * values.sqrt() @ axes.T


@pytest.mark.parametrize(("d_in", "d_out"), [(12, 9), (9, 12), (10, 10)])
def test_a_matrix_alone_is_what_an_svd_between_both_roots_gives(d_in, d_out):
    weight, inner, outer = drawn(d_in, d_out, seed=0), gram(d_in, 1), gram(d_out, 2)
    root = square_root([outer])
    left, right, error, values = low_rank(seen_through(weight, root), inner, 4)
    left_root, right_root = symmetric_root(inner), symmetric_root(outer)
    assert values is not None
    u, s, vh = torch.linalg.svd(left_root @ weight @ right_root)
    torch.testing.assert_close(values[:9], s[:9].square(), rtol=1e-8, atol=1e-8)
    assert error == pytest.approx(float(s[4:].square().sum() / s.square().sum()))
    expected = torch.linalg.inv(left_root) @ (u[:, :4] * s[:4]) @ vh[:4] @ torch.linalg.inv(right_root)
    plain = torch.linalg.solve_triangular(root, (left @ right).T, upper=True).T
    torch.testing.assert_close(plain, expected, rtol=1e-7, atol=1e-9)


def test_a_joint_basis_weighs_every_member_by_its_own_outputs():
    weights, inner = [drawn(8, 6, seed=0), drawn(8, 5, seed=1)], gram(8, 2)
    outers = [gram(6, 3), gram(5, 4)]
    roots = [square_root([outer]) for outer in outers]
    seen = [seen_through(*each) for each in zip(weights, roots, strict=True)]
    factors = seen_plainly(share_input(seen, [inner, inner], 3), roots, "input")

    def loss(basis: torch.Tensor, coefs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        changes = [basis @ coef - weight for coef, weight in zip(coefs, weights, strict=True)]
        return sum(
            ((change.T @ inner @ change @ outer).trace() for change, outer in zip(changes, outers, strict=True)),
            torch.zeros((), dtype=torch.float64),
        )

    parts = [factors.basis.clone().requires_grad_(), *(coef.clone().requires_grad_() for coef in factors.coefs)]
    found = loss(parts[0], tuple(parts[1:]))
    for gradient, part in zip(torch.autograd.grad(found, parts), parts, strict=True):
        assert torch.linalg.norm(gradient) < 1e-7 * torch.linalg.norm(part) * found.detach()  # a stationary point
    for seed in range(20):  # and no worse than what is near
        moved = [part.detach() + 0.05 * drawn(*part.shape, seed=seed) for part in parts]
        assert loss(moved[0], tuple(moved[1:])) > found
    whole = sum(float((w.T @ inner @ w @ outer).trace()) for w, outer in zip(weights, outers, strict=True))
    assert factors.error == pytest.approx(float(found.detach()) / whole)
    norms = factors.basis.norm(dim=0), torch.stack([coef.norm(dim=1) for coef in factors.coefs]).square().mean(0).sqrt()
    torch.testing.assert_close(*norms)


def test_private_directions_and_a_basis_on_the_output_side_are_undone():
    weight, inner, root = drawn(7, 9, seed=0), gram(7, 1), square_root([gram(9, 2)])
    seen = seen_through(weight, root)
    factors = share_and_own([seen], [inner], 3, 2, "output")
    plain = seen_plainly(factors, [root], "output")
    (down, up), (d, u) = factors.own[0], plain.own[0]
    product = factors.coefs[0] @ factors.basis + down @ up
    torch.testing.assert_close((plain.coefs[0] @ plain.basis + d @ u) @ root.T, product, rtol=1e-8, atol=1e-8)


def test_shrinking_keeps_the_trace():
    matrix = gram(6, 0)
    assert torch.equal(shrunk(matrix, 0), matrix)
    half = shrunk(matrix, 0.5)
    torch.testing.assert_close(half.trace(), matrix.trace())
    torch.testing.assert_close(half - half.diagonal().diag(), (matrix - matrix.diagonal().diag()) / 2)
    assert half.diagonal().max() < matrix.diagonal().max()
