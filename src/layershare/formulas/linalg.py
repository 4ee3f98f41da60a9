"""The mathematics, in float64: pure functions of tensors. Row convention y = xW with W: d_in × d_out.

Every function minimises an activation-weighted error Σᵢ‖Xᵢ(Wᵢ − Ŵᵢ)‖² that depends on the inputs Xᵢ only through
their Gram matrices Gᵢ = XᵢᵀXᵢ. Weights and Grams come in any floating type and are widened a panel at a time, so that
no second copy of a large matrix is made. Eigenproblems are of the shared side's width, never n·d_out. Of symmetric
products only the lower triangle is computed, which is all that Cholesky and `eigh` read.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from scipy.linalg import qr
from torch import Tensor

RIDGE = 1e-12
"""Added to a Gram matrix before it is inverted, relative to its mean eigenvalue; negative eigenvalues count as 0."""
REFIT_RIDGE = 1e-8
"""The same for a refit, where nothing frees the matrix of negative eigenvalues from the rounding of float32 Grams."""
MEAN_RIDGE = 1e-6
"""The same for a mean of weights, where the Grams' rounding errors would be divided by each other."""
SETTLED = 1e-3
"""Alternating forms have settled when a round takes less than this part off the error."""
_PANEL = 256
"""Rows or columns of a matrix that are widened to float64 at once."""
_BLOCK = 256
"""Rows of a triangle that are computed at once: few enough to save half the work, enough for fast products."""


@dataclass(frozen=True)
class Factors:
    """One basis, one coefficient matrix per layer, and what the approximation loses.

    Input side: `basis` d_in × k, `coefs` k × d_out, Ŵᵢ = B Cᵢ. Output side: `basis` k × d_out, `coefs` d_in × k,
    Ŵᵢ = Aᵢ B. `error` is Σᵢ‖Xᵢ(Wᵢ − Ŵᵢ)‖² / Σᵢ‖XᵢWᵢ‖², `spectrum` all eigenvalues in falling order: what each further
    rank takes off the error, where the method has such a list. With `order` the basis is in pivoted form: see
    `pivot_factors`. `own`: private directions beside, Dᵢ (d_in × r) and Eᵢ (r × d_out) per layer, Ŵᵢ = … + DᵢEᵢ.
    """

    basis: Tensor
    coefs: tuple[Tensor, ...]
    error: float
    spectrum: Tensor | None = None
    order: Tensor | None = None
    own: tuple[tuple[Tensor, Tensor], ...] = ()


def share_input(weights: Sequence[Tensor], grams: Sequence[Tensor | None], rank: int) -> Factors:
    """One basis on the input side, for matrices that read a common space (Basis Sharing, §3.1).

    With G = ΣGᵢ = SᵀS, U_k are the top eigenvectors of S(ΣWᵢWᵢᵀ)Sᵀ, B = S⁻¹U_k and Cᵢ = U_kᵀSWᵢ: what an SVD of the
    d_in × n·d_out matrix S[W₁ … W_n] gives, by a d_in × d_in problem. The error is the sum of dropped eigenvalues, that
    under the pooled Gram G. `weights`: n of d_in × d_out; `grams`: n of d_in × d_in, or all `None` for G = 1.
    """
    moment, root = _input_moment(weights, grams)
    values, vectors = _top(moment, rank)
    if root is None:
        encoder = decoder = vectors
    else:
        encoder = root.T @ vectors  # SᵀU_k
        decoder = torch.linalg.solve_triangular(root, vectors, upper=True)  # S⁻¹U_k
    coefs = [_apply_transposed(encoder, weight) for weight in weights]
    scale = _balance(decoder, [coef.T for coef in coefs])
    coefs = tuple(coef.div_(scale[:, None]) for coef in coefs)
    return Factors(decoder * scale, coefs, _dropped(values, rank), values)


def share_output(weights: Sequence[Tensor], grams: Sequence[Tensor | None], rank: int) -> Factors:
    """One basis on the output side, for matrices that write into a common space.

    V_k are the top eigenvectors of M = ΣWᵢᵀGᵢWᵢ (d_out × d_out), B = V_kᵀ and Aᵢ = WᵢV_k; nothing is inverted.
    `weights`: n of d_in × d_out; `grams`: n of d_in × d_in, or `None` for Gᵢ = 1.
    """
    values, basis = _top(_output_moment(weights, grams), rank)
    coefs = [_apply_transposed(basis, weight.T).T for weight in weights]
    scale = _balance(basis, coefs)
    return Factors((basis * scale).T, tuple(coef.div_(scale) for coef in coefs), _dropped(values, rank), values)


def low_rank(weight: Tensor, gram: Tensor | None, rank: int) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """The best rank-k approximation of one matrix under its Gram: left d_in × k, right k × d_out, error, spectrum.

    Both sides lead to the same optimum for a group of one, so the smaller of the two eigenproblems is solved.
    """
    d_in, d_out = weight.shape
    if d_in < d_out:
        factors = share_input([weight], [gram], rank)
        return factors.basis, factors.coefs[0], factors.error, factors.spectrum
    factors = share_output([weight], [gram], rank)
    return factors.coefs[0], factors.basis, factors.error, factors.spectrum


def share_and_own(
    weights: Sequence[Tensor],
    grams: Sequence[Tensor | None],
    rank: int,
    private_rank: int,
    side: Literal["input", "output"],
) -> Factors:
    """A shared basis and private directions, Ŵᵢ = BCᵢ + DᵢEᵢ (or AᵢB + DᵢEᵢ on the output side).

    The two closed forms take turns until the error falls by less than `SETTLED` of itself: the shared basis of what the
    private directions leave, Wᵢ − DᵢEᵢ, with coefficients under each layer's own Gram; then the best DᵢEᵢ of what that
    leaves. The best round counts. Weights and Grams as for `share_input`.
    """
    whole = sum(energy(weight, gram) for weight, gram in zip(weights, grams, strict=True))
    left, best = list(weights), None
    while True:
        if side == "input":
            made = share_input(left, grams, rank)
            fitted = (
                coef if gram is None else refit(made.basis, gram, target)
                for coef, gram, target in zip(made.coefs, grams, left, strict=True)
            )
            made = replace(made, coefs=tuple(fitted))
            shared = [made.basis @ coef for coef in made.coefs]
        else:
            made = share_output(left, grams, rank)
            shared = [coef @ made.basis for coef in made.coefs]
        rests = [weight.double() - product for weight, product in zip(weights, shared, strict=True)]
        own, lost = [], 0.0
        for rest, gram in zip(rests, grams, strict=True):
            down, up, error, _ = low_rank(rest, gram, private_rank)
            own.append((down, up))
            lost += error * energy(rest, gram)
        now = replace(made, error=lost / whole if whole else 0.0, spectrum=None, own=tuple(own))
        if best is not None and now.error >= best.error * (1 - SETTLED):
            return min(best, now, key=lambda each: each.error)
        best = now
        left = [weight.double() - down @ up for weight, (down, up) in zip(weights, own, strict=True)]


def spectrum(weights: Sequence[Tensor], grams: Sequence[Tensor | None], side: Literal["input", "output"]) -> Tensor:
    """σ² of S[W₁ … W_n], falling, float64: what each component of a shared basis takes from the error.

    They are the eigenvalues of the problem that `share_input` or `share_output` solves, as many as the shared side is
    wide. A group of one has the same on both sides, so the min(d_in, d_out) of the smaller problem are returned.
    """
    d_in, d_out = weights[0].shape
    if len(weights) == 1:
        side = "input" if d_in < d_out else "output"
    moment = _input_moment(weights, grams)[0] if side == "input" else _output_moment(weights, grams)
    return torch.linalg.eigvalsh(moment).flip(0).clamp(min=0)


def shared_spectra(weights: Sequence[Tensor], grams: Sequence[Tensor]) -> list[Tensor]:
    """What each direction of a shared basis takes off a layer's error ‖XᵢWᵢ‖² under its own Gram, not the pooled one.

    The directions are those of `share_input`, B = S⁻¹U, best first for the group. With RᵢᵀRᵢ = Gᵢ and Qᵢ from the QR
    decomposition of RᵢB, the first k of them and the best coefficients for them take ‖Q_kᵀRᵢWᵢ‖² off. Returns n of d_in
    values, float64.
    """
    moment, root = _input_moment(weights, grams)
    assert root is not None
    basis = torch.linalg.solve_triangular(root, _top(moment, len(moment))[1], upper=True)
    found = []
    for weight, gram in zip(weights, grams, strict=True):
        own = square_root([gram])
        directions = torch.linalg.qr(own @ basis).Q
        found.append(_apply_transposed(own.T @ directions, weight).square().sum(1))
    return found


def refit(basis: Tensor, gram: Tensor, weight: Tensor) -> Tensor:
    """Best coefficients of one layer for a fixed basis under the layer's own Gram: (BᵀGB + λ1)⁻¹BᵀGW.

    `basis`: d_in × k, `gram`: d_in × d_in of the inputs that the compressed model really produces, `weight`:
    d_in × d_out. λ is `REFIT_RIDGE` relative to the mean eigenvalue of BᵀGB. Returns k × d_out. (Basis Sharing, §3.3.)
    """
    wide, (rank, d_out) = basis.double(), (basis.shape[1], weight.shape[1])
    normal, target = wide.new_zeros(rank, rank), wide.new_zeros(rank, d_out)  # BᵀGB and BᵀGW
    for rows, panel, dense in zip(wide.split(_PANEL), _row_panels(gram), _row_panels(weight), strict=True):
        weighted = panel @ wide  # some rows of GB
        normal.addmm_(rows.T, weighted)
        target.addmm_(weighted.T, dense)
    normal.diagonal().add_(_ridge(normal, REFIT_RIDGE))
    return torch.linalg.solve(normal, target)


def ridge_fits(normal: Tensor, target: Tensor, present: Tensor, ridges: Sequence[float]) -> list[Tensor]:
    """(N + λ1)⁻¹(T + λC₀) for several λ, relative to the mean eigenvalue of N = PᵀG′P (k × k), from one `eigh`.

    `target`: T = PᵀKW and `present`: C₀, both k × d_out: the coefficients that a ridge pulls towards.
    """
    values, axes = torch.linalg.eigh(normal)
    values = values.clamp(min=0)
    aim, start = axes.T @ target, axes.T @ present
    scale = float(values.mean()) or 1.0
    return [axes @ ((aim + ridge * scale * start) / (values + ridge * scale)[:, None]) for ridge in ridges]


def pivoted(basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B = P[1; T]B_p with k of its rows as the identity's: T ((d−k) × k), the order of B's rows (d), B_p (k × k).

    The k rows of B_p come first in `order`, by size; then those of T. They are pivots of a QR decomposition of Qᵀ with
    B = QR, so that T = Q_oQ_p⁻¹ is the same for BM with any invertible M, however its columns are scaled, and exists
    for a B of lower rank, too. `basis`: d × k, k < d.
    """
    wide, rank = basis.double().cpu(), basis.shape[1]
    decomposed: Any = qr(torch.linalg.qr(wide).Q.T.numpy(), mode="r", pivoting=True)
    upper, order = torch.from_numpy(decomposed[0]), torch.from_numpy(decomposed[1]).long()
    rest = torch.linalg.solve_triangular(upper[:, :rank], upper[:, rank:], upper=True).T
    return rest.to(basis.device), order.to(basis.device), wide[order[:rank]].to(basis.device)


def pivot_factors(factors: Factors, side: Literal["input", "output"]) -> Factors:
    """The same product with its basis in pivoted form: T in place of B on the input side, Tᵀ on the output side.

    `order` says which entry of x comes first, second, … on the input side; on the output side, which entry of (z, zTᵀ)
    is the first, second, … of y.
    """
    if side == "input":
        rest, order, mixing = pivoted(factors.basis)
        return replace(factors, basis=rest, coefs=tuple(mixing @ coef.double() for coef in factors.coefs), order=order)
    rest, order, mixing = pivoted(factors.basis.T)
    coefs = tuple(coef.double() @ mixing.T for coef in factors.coefs)
    return replace(factors, basis=rest.T, coefs=coefs, order=order.argsort())


def root_mean_square(tensor: Tensor) -> float:
    """√(Σxᵢ²/n) of all entries, in float32."""
    return float(tensor.detach().float().square().mean().sqrt())


def weighted_mean(weights: Sequence[Tensor], grams: Sequence[Tensor | None]) -> Tensor:
    """M = (ΣGᵢ)⁻¹ΣGᵢWᵢ, which minimises Σ‖Xᵢ(Wᵢ − M)‖²; d_in × d_out, float64.

    It is solved for as W̄ + (ΣGᵢ + λ1)⁻¹ΣGᵢ(Wᵢ − W̄) with the plain mean W̄, which is left where the text shows nothing; λ
    is `MEAN_RIDGE` relative to the mean eigenvalue of ΣGᵢ. `weights`: n of d_in × d_out; `grams`: n of d_in × d_in, or
    all `None` for the plain mean.
    """
    mean = torch.zeros_like(weights[0], dtype=torch.float64)
    for weight in weights:
        mean += weight.double() / len(weights)
    total, target = _zeros(len(mean), mean), torch.zeros_like(mean)  # ΣGᵢ and ΣGᵢ(Wᵢ − W̄)
    for weight, gram in zip(weights, grams, strict=True):
        if gram is None:
            return mean
        total += gram
        apart = weight.double() - mean
        for rows, panel in zip(target.split(_PANEL), _row_panels(gram), strict=True):
            rows.addmm_(panel, apart)
    total.diagonal().add_(_ridge(total, MEAN_RIDGE))
    return mean + torch.linalg.solve(total, target)


def energy(weight: Tensor, gram: Tensor | None) -> float:
    """‖XW‖² = tr(WᵀGW); without a Gram, G = 1."""
    wide = weight.double()
    if gram is None:
        return float(wide.square().sum())
    panels = zip(wide.split(_PANEL), _row_panels(gram), strict=True)
    return float(sum((rows * (panel @ wide)).sum() for rows, panel in panels))


def relative_error(rests: Iterable[Tensor], weights: Sequence[Tensor], grams: Sequence[Tensor | None]) -> float:
    """Σ‖XᵢRᵢ‖² / Σ‖XᵢWᵢ‖² of what is left of weights, Rᵢ = Wᵢ − Ŵᵢ; 0 where there is nothing to lose."""
    lost, whole = (sum(map(energy, some, grams)) for some in (rests, weights))
    return lost / whole if whole else 0.0


def principal_axes(gram: Tensor, width: int, near: Tensor | None = None) -> tuple[Tensor, float]:
    """Q: d × width, the eigenvectors of the largest eigenvalues of G = XᵀX, and the lost part ‖X − XQQᵀ‖² / ‖X‖².

    Eigenvectors are free in sign: with `near`, another d × width, nearᵀQ gets a diagonal that is not negative. Q is
    rounded to float32.
    """
    values, axes = _top(gram.double(), width)
    if near is not None:
        axes = axes * torch.where((near.double() * axes).sum(0) < 0, -1.0, 1.0)
    return axes.float(), _dropped(values, width)


def square_root(grams: Sequence[Tensor]) -> Tensor:
    """Upper triangular S (d × d) with SᵀS = G + ridge, for G = ΣGᵢ.

    By Cholesky; where that fails because G is singular and rounding made eigenvalues negative, by the eigenvalues of
    G, those below zero counting as zero before the ridge. Never fails.
    """
    total = _zeros(len(grams[0]), grams[0])
    for gram in grams:
        total += gram
    ridge = _ridge(total, RIDGE)
    total.diagonal().add_(ridge)
    lower, failed = torch.linalg.cholesky_ex(total)
    if not failed:
        return lower.T
    values, axes = torch.linalg.eigh(total)
    return torch.linalg.qr(values.clamp(min=ridge).sqrt()[:, None] * axes.T).R


def _input_moment(weights: Sequence[Tensor], grams: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """The lower triangle of S(ΣWᵢWᵢᵀ)Sᵀ (d_in × d_in), with the S that was used, `None` for 1."""
    moment = _zeros(len(weights[0]), weights[0])
    for weight in weights:
        for panel in _column_panels(weight):
            _add_lower(moment, panel, panel.T)
    present = [gram for gram in grams if gram is not None]
    root = square_root(present) if present else None
    if root is not None:
        _congruence(moment, root)
    return moment, root


def _output_moment(weights: Sequence[Tensor], grams: Sequence[Tensor | None]) -> Tensor:
    """The lower triangle of ΣWᵢᵀGᵢWᵢ (d_out × d_out)."""
    moment = _zeros(weights[0].shape[1], weights[0])
    for weight, gram in zip(weights, grams, strict=True):
        wide = weight.double()
        if gram is None:
            _add_lower(moment, wide.T, wide)
            continue
        for rows, panel in zip(wide.split(_PANEL), _row_panels(gram), strict=True):
            _add_lower(moment, rows.T, panel @ wide)
    return moment


def _zeros(width: int, like: Tensor) -> Tensor:
    return torch.zeros(width, width, dtype=torch.float64, device=like.device)


def _add_lower(moment: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left · right, d × m and m × d, to the lower triangle of `moment`, for sums of products that are symmetric."""
    for start in range(0, len(moment), _BLOCK):
        rows, columns = slice(start, start + _BLOCK), slice(start + _BLOCK)
        moment[rows, columns].addmm_(left[rows], right[:, columns])


def _congruence(moment: Tensor, root: Tensor) -> None:
    """Replace M by SMSᵀ for upper triangular S.

    Reads only the lower triangle of each operand; the upper triangles are work space. Block after block of columns j,
    M_{≥j,j} becomes M_{≥j,≥j}(Sᵀ)_{≥j,j}, of which row block j then gives row j of the result; neither is read again,
    so that a quarter of the work of two full products is done, in place.
    """
    upper = moment.tril(-1).T
    moment.tril_().add_(upper)
    for start in range(0, len(moment), _BLOCK):
        block, rest, before = slice(start, start + _BLOCK), slice(start, None), slice(start + _BLOCK)
        moment[rest, block] = moment[rest, rest] @ root[block, rest].T
        moment[block, before] = root[block, rest] @ moment[rest, before]


def _apply_transposed(left: Tensor, weight: Tensor) -> Tensor:
    """leftᵀ W in float64, a panel of W at a time: left d × k, W d × m, result k × m."""
    result = left.new_empty(left.shape[1], weight.shape[1])
    for part, panel in zip(result.split(_PANEL, dim=1), _column_panels(weight), strict=True):
        torch.mm(left.T, panel, out=part)
    return result


def _column_panels(matrix: Tensor) -> Iterator[Tensor]:
    return (panel.double() for panel in matrix.split(_PANEL, dim=1))


def _row_panels(matrix: Tensor) -> Iterator[Tensor]:
    return (panel.double() for panel in matrix.split(_PANEL))


def _top(moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues in falling order, none below zero, and in columns the eigenvectors of the first `rank` of them.

    Only the lower triangle of `moment` is read.
    """
    values, vectors = torch.linalg.eigh(moment)
    return values.flip(0).clamp(min=0), vectors[:, -rank:].flip(1)


def _ridge(matrix: Tensor, relative: float) -> float:
    """What is added to the diagonal of a Gram before it is inverted; for the Gram of inputs that are all zero, 1."""
    return relative * float(matrix.diagonal().mean()) or 1.0


def _balance(basis: Tensor, coefs: Sequence[Tensor]) -> Tensor:
    """A factor per component (k) that gives basis and coefficients equal norms, so that half precision fits both.

    Components are columns: `basis` d × k, `coefs` n of m × k.
    """
    ours = torch.linalg.vector_norm(basis, dim=0)
    theirs = torch.stack([torch.linalg.vector_norm(coef, dim=0) for coef in coefs]).square().mean(0).sqrt()
    return torch.where(ours * theirs > 0, theirs / ours, 1.0).sqrt()


def balanced(factors: Factors, side: Literal["input", "output"]) -> Factors:
    """The same product with equal norms of basis and coefficients in every component, so that half precision fits."""
    if side == "input":
        scale = _balance(factors.basis, [coef.T for coef in factors.coefs])
        coefs = tuple(coef / scale[:, None] for coef in factors.coefs)
        return replace(factors, basis=factors.basis * scale, coefs=coefs)
    scale = _balance(factors.basis.T, factors.coefs)
    return replace(factors, basis=factors.basis * scale[:, None], coefs=tuple(coef / scale for coef in factors.coefs))


def _dropped(values: Tensor, rank: int) -> float:
    total = float(values.sum())
    return float(values[rank:].sum()) / total if total else 0.0
