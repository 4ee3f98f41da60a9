"""The mathematics, in float64: pure functions of tensors. Row convention y = xW with W: d_in × d_out.

Every function minimises an activation-weighted error Σᵢ‖Xᵢ(Wᵢ − Ŵᵢ)‖² that depends on the inputs Xᵢ only through
their Gram matrices Gᵢ = XᵢᵀXᵢ. Weights and Grams come in any floating type and are widened a panel at a time, so that
no second copy of a large matrix is made. Eigenproblems are of the shared side's width, never n·d_out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-12
"""Added to a Gram matrix before it is inverted, relative to its mean eigenvalue; negative eigenvalues count as 0."""
REFIT_RIDGE = 1e-8
"""The same for a refit, whose matrix is not freed of the rounding of float32 Grams by an eigendecomposition."""
_PANEL = 1024


@dataclass(frozen=True)
class Factors:
    """One basis, one coefficient matrix per layer, and what the approximation loses.

    Input side: `basis` d_in × k, `coefs` k × d_out, Ŵᵢ = B Cᵢ. Output side: `basis` k × d_out, `coefs` d_in × k,
    Ŵᵢ = Aᵢ B. `error` is Σᵢ‖Xᵢ(Wᵢ − Ŵᵢ)‖² / Σᵢ‖XᵢWᵢ‖², `spectrum` all eigenvalues in falling order: what each further
    rank takes off the error, where the method has such a list.
    """

    basis: Tensor
    coefs: tuple[Tensor, ...]
    error: float
    spectrum: Tensor | None = None


def share_input(weights: Sequence[Tensor], grams: Sequence[Tensor | None], rank: int) -> Factors:
    """One basis on the input side, for matrices that read a common space (Basis Sharing, §3.1).

    With G = ΣGᵢ = SᵀS, U_k are the top eigenvectors of S(ΣWᵢWᵢᵀ)Sᵀ, B = S⁻¹U_k and Cᵢ = U_kᵀSWᵢ: what an SVD of the
    d_in × n·d_out matrix S[W₁ … W_n] gives, by a d_in × d_in problem. The error is the sum of dropped eigenvalues.
    S comes from the eigendecomposition of G, which cannot fail as a Cholesky can. `weights`: n of d_in × d_out;
    `grams`: n of d_in × d_in, or all `None` for G = 1.
    """
    moment = sum_of(panel @ panel.T for weight in weights for panel in _column_panels(weight))
    if any(gram is None for gram in grams):
        values, vectors = _descending(moment)
        encoder = decoder = vectors[:, :rank]
    else:
        roots, axes = whitening(sum_of(gram.double() for gram in grams if gram is not None))
        moment = roots[:, None] * (axes.T @ moment @ axes) * roots
        values, vectors = _descending(moment)
        encoder = axes @ (roots[:, None] * vectors[:, :rank])  # SᵀU_k
        decoder = axes @ (vectors[:, :rank] / roots[:, None])  # S⁻¹U_k
    coefs = [_apply_transposed(encoder, weight) for weight in weights]
    scale = _balance(decoder, [coef.T for coef in coefs])
    coefs = tuple(coef.div_(scale[:, None]) for coef in coefs)
    return Factors(decoder * scale, coefs, _dropped(values, rank), values)


def share_output(weights: Sequence[Tensor], grams: Sequence[Tensor | None], rank: int) -> Factors:
    """One basis on the output side, for matrices that write into a common space.

    V_k are the top eigenvectors of M = ΣWᵢᵀGᵢWᵢ (d_out × d_out), B = V_kᵀ and Aᵢ = WᵢV_k; nothing is inverted.
    `weights`: n of d_in × d_out; `grams`: n of d_in × d_in, or `None` for Gᵢ = 1.
    """
    moment = sum_of(_output_moment(weight, gram) for weight, gram in zip(weights, grams, strict=True))
    values, vectors = _descending(moment)
    basis = vectors[:, :rank]
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


def refit(basis: Tensor, gram: Tensor, weight: Tensor) -> Tensor:
    """Best coefficients of one layer for a fixed basis under the layer's own Gram: (BᵀGB + λ1)⁻¹BᵀGW.

    `basis`: d_in × k, `gram`: d_in × d_in of the inputs that the compressed model really produces, `weight`:
    d_in × d_out. λ is `REFIT_RIDGE` relative to the mean eigenvalue of BᵀGB. Returns k × d_out. (Basis Sharing, §3.3.)
    """
    wide = basis.double()
    weighted = torch.cat([panel @ wide for panel in _row_panels(gram)])  # GB: d_in × k
    normal = wide.T @ weighted
    normal.diagonal().add_(_ridge(normal, REFIT_RIDGE))
    return _apply_transposed(torch.linalg.solve(normal, weighted.T).T, weight)


def whitening(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Roots r (d) and axes Q (d × d) with G + ridge = Q diag(r²) Qᵀ, so S = diag(r)Qᵀ gives SᵀS = G.

    Eigenvalues below zero, which rounding makes, count as zero before the ridge. Raises nothing for a singular G.
    """
    values, axes = torch.linalg.eigh(gram)
    return (values.clamp(min=0) + _ridge(gram, RIDGE)).sqrt(), axes


def sum_of(matrices: Iterator[Tensor]) -> Tensor:
    """The sum of matrices that come one at a time, held once."""
    total = next(matrices).clone()
    for matrix in matrices:
        total += matrix
    return total


def _output_moment(weight: Tensor, gram: Tensor | None) -> Tensor:
    """WᵀGW (d_out × d_out) without a float64 copy of G."""
    wide = weight.double()
    if gram is None:
        return wide.T @ wide
    start, panels = 0, []
    for panel in _row_panels(gram):
        panels.append(wide[start : start + len(panel)].T @ (panel @ wide))
        start += len(panel)
    return sum_of(iter(panels))


def _apply_transposed(left: Tensor, weight: Tensor) -> Tensor:
    """leftᵀ W in float64, a panel of W at a time: left d × k, W d × m, result k × m."""
    return torch.cat([left.T @ panel for panel in _column_panels(weight)], dim=1)


def _column_panels(matrix: Tensor) -> Iterator[Tensor]:
    return (panel.double() for panel in matrix.split(_PANEL, dim=1))


def _row_panels(matrix: Tensor) -> Iterator[Tensor]:
    return (panel.double() for panel in matrix.split(_PANEL))


def _descending(moment: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenvalues in falling order, none below zero, with their eigenvectors in columns."""
    values, vectors = torch.linalg.eigh(moment)
    return values.flip(0).clamp(min=0), vectors.flip(1)


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


def _dropped(values: Tensor, rank: int) -> float:
    total = float(values.sum())
    return float(values[rank:].sum()) / total if total else 0.0
