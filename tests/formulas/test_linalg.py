import pytest
import torch

from layershare.formulas.linalg import (
    energy,
    low_rank,
    refit,
    share_and_own,
    share_input,
    share_output,
    shared_spectra,
    spectrum,
    square_root,
    weighted_mean,
)


def random_inputs(n, d, tokens=200, scale=True):
    inputs = [torch.randn(tokens, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64) for _ in range(n)]
    return inputs, [x.T @ x for x in inputs]


def products(factors, side):
    return [factors.basis @ c if side == "input" else c @ factors.basis for c in factors.coefs]


def loss(inputs, weights, approximations):
    return sum(float((x @ (w - a)).square().sum()) for x, w, a in zip(inputs, weights, approximations, strict=True))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(("d_in", "d_out"), [(24, 40), (40, 24), (32, 32), (600, 530)])
def test_input_side_equals_the_svd_of_the_whitened_concatenation(n, d_in, d_out):
    _, grams = random_inputs(n, d_in, tokens=2 * d_in)
    weights = [torch.randn(d_in, d_out, dtype=torch.float64) for _ in range(n)]
    rank = 10
    root = torch.linalg.cholesky(sum(grams)).T  # S with SᵀS = G, as published
    u, s, vh = torch.linalg.svd(root @ torch.cat(weights, dim=1), full_matrices=False)
    published = torch.linalg.inv(root) @ (u[:, :rank] * s[:rank]) @ vh[:rank]
    factors = share_input(weights, grams, rank)
    ours = torch.cat(products(factors, "input"), dim=1)
    assert factors.basis.shape == (d_in, rank)
    assert (ours - published).norm() / published.norm() < 1e-8
    assert factors.error == pytest.approx(float(s[rank:].square().sum() / s.square().sum()), rel=1e-8)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(("d_in", "d_out"), [(24, 40), (530, 300)])
def test_output_side_equals_the_pca_of_the_outputs_and_its_error_is_the_measured_one(n, d_in, d_out):
    inputs, grams = random_inputs(n, d_in, tokens=2 * d_in)
    weights = [torch.randn(d_in, d_out, dtype=torch.float64) for _ in range(n)]
    factors = share_output(weights, grams, 9)
    outputs = torch.cat([x @ w for x, w in zip(inputs, weights, strict=True)])
    _, s, vh = torch.linalg.svd(outputs, full_matrices=False)
    projector = vh[:9].T @ vh[:9]
    for ours, weight in zip(products(factors, "output"), weights, strict=True):
        torch.testing.assert_close(ours, weight @ projector, rtol=0, atol=1e-8)
    measured = loss(inputs, weights, products(factors, "output")) / float(outputs.square().sum())
    assert factors.error == pytest.approx(measured, rel=1e-8)
    assert measured == pytest.approx(float(s[9:].square().sum() / s.square().sum()), rel=1e-8)


def test_the_input_side_error_is_the_measured_one_where_all_layers_read_the_same():
    inputs, grams = random_inputs(1, 24)
    weights = [torch.randn(24, 30, dtype=torch.float64) for _ in range(2)]
    factors = share_input(weights, [grams[0] / 2] * 2, 12)
    total = sum(float((inputs[0] @ w).square().sum()) for w in weights)
    measured = loss(inputs * 2, weights, products(factors, "input")) / total
    assert factors.error == pytest.approx(measured, rel=1e-8)


def test_two_layers_built_on_one_input_basis_are_lossless_on_that_side_alone():
    basis = torch.randn(32, 6, dtype=torch.float64)
    weights = [basis @ torch.randn(6, 32, dtype=torch.float64) for _ in range(2)]
    _, grams = random_inputs(2, 32)
    assert share_input(weights, grams, 6).error < 1e-12
    assert share_output(weights, grams, 6).error > 0.1
    transposed = [weight.T.contiguous() for weight in weights]
    assert share_output(transposed, grams, 6).error < 1e-12
    assert share_input(transposed, grams, 6).error > 0.1


@pytest.mark.parametrize(("d_in", "d_out"), [(20, 36), (36, 20), (28, 28)])
@pytest.mark.parametrize("weighted", [True, False])
def test_one_matrix_has_the_same_optimum_on_either_side(d_in, d_out, weighted):
    _, (gram,) = random_inputs(1, d_in)
    given = gram if weighted else None
    weight = torch.randn(d_in, d_out, dtype=torch.float64)
    root = torch.linalg.cholesky(gram).T if weighted else torch.eye(d_in, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(root @ weight, full_matrices=False)
    best = torch.linalg.solve(root, (u[:, :7] * s[:7]) @ vh[:7])
    left, right, error, spectrum = low_rank(weight, given, 7)
    torch.testing.assert_close(left @ right, best, rtol=0, atol=1e-8)
    assert error == pytest.approx(float(s[7:].square().sum() / s.square().sum()), rel=1e-8)
    torch.testing.assert_close(spectrum, s.square(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solve", [share_input, share_output])
def test_full_rank_reproduces_the_weights(solve):
    weights = [torch.randn(24, 16, dtype=torch.float64) for _ in range(2)]
    _, grams = random_inputs(2, 24)
    factors = solve(weights, grams, 24 if solve is share_input else 16)
    for ours, weight in zip(products(factors, "input" if solve is share_input else "output"), weights, strict=True):
        torch.testing.assert_close(ours, weight, rtol=0, atol=1e-8)


def test_basis_and_coefficients_have_equal_norms():
    weights = [torch.randn(24, 40, dtype=torch.float64) for _ in range(3)]
    _, grams = random_inputs(3, 24)
    factors = share_input(weights, [1e6 * gram for gram in grams], 8)
    coefs = torch.stack([coef.norm(dim=1) for coef in factors.coefs]).square().mean(0).sqrt()
    torch.testing.assert_close(factors.basis.norm(dim=0), coefs)


def test_a_rank_deficient_gram_and_a_zero_one_do_no_harm():
    weights = [torch.randn(24, 16, dtype=torch.float64) for _ in range(2)]
    inputs, grams = random_inputs(2, 24, tokens=5)
    factors = share_input(weights, grams, 10)
    assert factors.error < 1e-6
    assert loss(inputs, weights, products(factors, "input")) < 1e-6 * loss(inputs, weights, [0 * w for w in weights])
    for solve in (share_input, share_output):
        assert all(x.isfinite().all() for x in solve(weights, [torch.zeros(24, 24)] * 2, 4).coefs)


@pytest.mark.parametrize("width", [24, 700])
def test_the_square_root_gives_back_the_gram(width):
    _, grams = random_inputs(2, width, tokens=2 * width)
    root = square_root([gram.float() for gram in grams])
    gram = torch.stack([gram.float() for gram in grams]).double().sum(0)
    assert torch.equal(root, root.triu())
    assert (root.T @ root - gram).norm() / gram.norm() < 1e-11


def test_the_square_root_of_a_gram_that_has_no_cholesky_takes_negative_eigenvalues_for_zero():
    axes = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))[0]
    values = torch.linspace(-1e-6, 1, 24, dtype=torch.float64)
    gram = axes * values @ axes.T
    assert torch.linalg.cholesky_ex(gram).info > 0
    root = square_root([gram])
    assert torch.equal(root, root.triu())
    torch.testing.assert_close(root.T @ root, axes * values.clamp(min=0) @ axes.T, rtol=0, atol=1e-10)
    assert torch.linalg.svdvals(root).min() > 1e-7


@pytest.mark.parametrize("rank", [10, 40])
def test_a_float32_gram_of_fewer_tokens_than_inputs_is_solved_for_the_directions_that_the_text_shows(rank):
    x = torch.randn(20, 64)
    gram = x.T @ x
    assert torch.linalg.cholesky_ex(gram.double()).info > 0
    weights = [torch.randn(64, 48) for _ in range(2)]
    factors = share_input(weights, [gram, gram], rank)
    best = torch.linalg.svdvals(x.double() @ torch.cat(weights, dim=1).double()).square()
    measured = loss([x.double()] * 2, [w.double() for w in weights], products(factors, "input"))
    assert measured / float(best.sum()) == pytest.approx(float(best[rank:].sum() / best.sum()), rel=1e-5, abs=1e-6)


def test_refit_is_the_least_squares_solution_for_the_layers_own_inputs():
    inputs, (gram,) = random_inputs(1, 24)
    basis = torch.randn(24, 6, dtype=torch.float64)
    weight = torch.randn(24, 30, dtype=torch.float64)
    coef = refit(basis, gram, weight)
    expected = torch.linalg.lstsq(inputs[0] @ basis, inputs[0] @ weight).solution
    torch.testing.assert_close(coef, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_floating_type_is_solved_in_float64_panel_by_panel(dtype):
    weights = [torch.randn(40, 1500).to(dtype) for _ in range(2)]
    _, grams = random_inputs(2, 40)
    ours = share_input(weights, [gram.float() for gram in grams], 8)
    wide = share_input([w.double() for w in weights], [gram.float().double() for gram in grams], 8)
    assert ours.basis.dtype == torch.float64
    torch.testing.assert_close(ours.basis.abs(), wide.basis.abs())
    tall = torch.randn(1500, 40).to(dtype)
    _, (gram,) = random_inputs(1, 1500)
    torch.testing.assert_close(low_rank(tall, gram, 5)[2], low_rank(tall.double(), gram, 5)[2])


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(("n", "d_in", "d_out"), [(1, 24, 40), (1, 40, 24), (2, 24, 30), (3, 30, 8)])
def test_the_spectrum_is_that_of_the_scaled_weights(n, d_in, d_out, side, weighted):
    _, grams = random_inputs(n, d_in)
    weights = [torch.randn(d_in, d_out, dtype=torch.float64) for _ in range(n)]
    roots = [torch.linalg.cholesky(gram).T if weighted else torch.eye(d_in, dtype=torch.float64) for gram in grams]
    if side == "input":
        root = torch.linalg.cholesky(sum(grams)).T if weighted else roots[0]
        scaled = root @ torch.cat(weights, dim=1)
    else:
        scaled = torch.cat([root @ weight for root, weight in zip(roots, weights, strict=True)])
    values = spectrum(weights, grams if weighted else [None] * n, side)
    expected = torch.linalg.svdvals(scaled).square()
    torch.testing.assert_close(values[: len(expected)], expected, rtol=1e-8, atol=1e-8 * float(expected[0]))
    assert float(values[len(expected) :].sum()) < 1e-8 * float(expected[0])
    assert n > 1 or len(values) == min(d_in, d_out)


def test_what_a_shared_basis_takes_off_each_layer_s_error_is_that_of_least_squares():
    inputs, grams = random_inputs(3, 9)
    weights = [torch.randn(9, 7, dtype=torch.float64) for _ in range(3)]
    spectra = shared_spectra(weights, grams)
    for rank in (1, 4, 9):
        basis = share_input(weights, grams, rank).basis
        for x, weight, found in zip(inputs, weights, spectra, strict=True):
            wanted = x @ weight
            fit = torch.linalg.lstsq(x @ basis, wanted).solution
            left = float((wanted - x @ basis @ fit).square().sum())
            whole = float(wanted.square().sum())
            assert whole - float(found[:rank].sum()) == pytest.approx(left, rel=1e-6, abs=1e-8 * whole)


def test_the_weighted_mean_is_the_least_squares_solution_over_all_layers():
    inputs, grams = random_inputs(3, 20)
    weights = [torch.randn(20, 7, dtype=torch.float64) for _ in range(3)]
    expected = torch.linalg.lstsq(
        torch.cat(inputs), torch.cat([x @ w for x, w in zip(inputs, weights, strict=True)])
    ).solution
    torch.testing.assert_close(weighted_mean(weights, grams), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weighted_mean(weights, [None] * 3), sum(weights) / 3)


def test_the_weighted_mean_is_the_plain_one_where_the_text_shows_nothing():
    x = torch.randn(40, 8)
    gram = torch.zeros(20, 20)
    gram[:8, :8] = x.T @ x
    weights = [torch.randn(20, 7) for _ in range(2)]
    mean = weighted_mean(weights, [gram, 3 * gram])
    torch.testing.assert_close(mean[:8], ((weights[0] + 3 * weights[1]) / 4)[:8].double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean[8:], ((weights[0] + weights[1]) / 2)[8:].double())


def test_energy_is_that_of_the_outputs():
    (x,), (gram,) = random_inputs(1, 20)
    weight = torch.randn(20, 7, dtype=torch.float64)
    assert energy(weight, gram) == pytest.approx(float((x @ weight).square().sum()))
    assert energy(weight, None) == pytest.approx(float(weight.square().sum()))


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("with_grams", [True, False])
def test_shared_and_private_directions_beat_either_alone(side, with_grams):
    n, d_in, d_out, rank, private = 3, 24, 20, 5, 3
    inputs, grams = random_inputs(n, d_in)
    if not with_grams:
        inputs, grams = [torch.eye(d_in, dtype=torch.float64)] * n, [None] * n
    common = torch.randn(d_in, rank, dtype=torch.float64), torch.randn(rank, d_out, dtype=torch.float64)
    weights = []
    for _ in range(n):
        shared = common[0] @ torch.randn(rank, d_out, dtype=torch.float64)
        if side == "output":
            shared = torch.randn(d_in, rank, dtype=torch.float64) @ common[1]
        own = torch.randn(d_in, private, dtype=torch.float64) @ torch.randn(private, d_out, dtype=torch.float64)
        weights.append(shared + own + 0.1 * torch.randn(d_in, d_out, dtype=torch.float64))
    factors = share_and_own(weights, grams, rank, private, side)
    assert [tuple(part.shape for part in pair) for pair in factors.own] == [((d_in, private), (private, d_out))] * n
    made = [a + down @ up for a, (down, up) in zip(products(factors, side), factors.own, strict=True)]
    measured = loss(inputs, weights, made) / loss(inputs, weights, [torch.zeros_like(w) for w in weights])
    assert factors.error == pytest.approx(measured, rel=1e-6)
    share = share_input if side == "input" else share_output
    assert factors.error < 0.2 * share(weights, grams, rank).error
    alone = [low_rank(weight, gram, rank) for weight, gram in zip(weights, grams, strict=True)]
    assert loss(inputs, weights, made) < 0.5 * loss(inputs, weights, [left @ right for left, right, *_ in alone])
    again = share_and_own(weights, grams, rank, private, side)
    assert torch.equal(factors.basis, again.basis)


def test_a_joint_basis_is_that_of_the_matrices_side_by_side():
    x = torch.randn(200, 24, dtype=torch.float64)
    gate, up = (torch.randn(24, width, dtype=torch.float64) for width in (40, 16))
    joint, both = share_input([gate, up], [x.T @ x] * 2, 9), share_input([torch.cat((gate, up), 1)], [x.T @ x], 9)
    torch.testing.assert_close(torch.cat(products(joint, "input"), 1), *products(both, "input"))
    assert joint.error == pytest.approx(both.error)


@pytest.mark.parametrize("dead", ["weights", "grams"])
def test_shared_and_private_directions_of_nothing(dead):
    weights = [torch.zeros(6, 5) if dead == "weights" else torch.randn(6, 5) for _ in range(2)]
    grams = [torch.zeros(6, 6) if dead == "grams" else torch.eye(6) for _ in range(2)]
    assert share_and_own(weights, grams, 2, 2, "input").error == 0
