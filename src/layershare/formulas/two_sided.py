"""Weighting errors by what they do to the loss: by the Gram of a matrix's inputs and by that of its output gradients.

A change Δ of W: d_in × d_out raises the loss by about ½ tr(ΔᵀGΔΓ) / N² with G = ΣxᵀX and Γ = Σgᵀg over N tokens, x the
inputs and g the gradients of the loss at the outputs: the second-order term with the curvature as K-FAC factors it
(OBD-LLM, arXiv 2604.00821; KFAC-SVD, arXiv 2610.32878). With Γ = RᵀR that is the one-sided error of W seen through R,
‖X(WRᵀ − ŴRᵀ)‖², so that every one-sided form solves it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from layershare.formulas.linalg import Factors, balanced


def shrunk(gram: Tensor, share: float) -> Tensor:
    """(1 − s)G + s · mean(diag G) · 1: a Gram of few tokens, towards one that favours no direction; float64."""
    wide = (1 - share) * gram.double()
    wide.diagonal().add_(share * gram.diagonal().double().mean())
    return wide


def seen_through(weight: Tensor, root: Tensor) -> Tensor:
    """WRᵀ in float64. `weight`: d_in × d_out, `root`: R with RᵀR = Γ, upper triangular, d_out × d_out."""
    return weight.double() @ root.T


def seen_plainly(factors: Factors, roots: Sequence[Tensor], side: Literal["input", "output"]) -> Factors:
    """Factors of the WᵢRᵢᵀ as factors of the Wᵢ, in equal norms again: what stands on the right is multiplied by Rᵢ⁻ᵀ.

    A basis on the output side stands on the right of all Wᵢ, so there is one R then, of a group of one.
    """

    def plainly(right: Tensor, root: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(root, right.double().T, upper=True).T

    if side == "input":
        coefs = tuple(plainly(coef, root) for coef, root in zip(factors.coefs, roots, strict=True))
        made = replace(factors, coefs=coefs)
    else:
        (root,) = roots
        made = replace(factors, basis=plainly(factors.basis, root))
    own = tuple((left, plainly(right, root)) for (left, right), root in zip(factors.own, roots, strict=False))
    return balanced(replace(made, own=own), side)
