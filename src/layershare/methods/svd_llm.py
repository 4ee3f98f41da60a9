"""SVD-LLM: truncation-aware low rank, every matrix for itself; Basis Sharing with groups of one.

Paper: Wang, Zheng, Wan, Zhang, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model
Compression", ICLR 2025, arXiv 2403.07378. With S from SᵀS = XᵀX, SW = UΣVᵀ and W′ = S⁻¹U_kΣ_kV_kᵀ: dropping σᵢ costs
exactly σᵢ in ‖XW − XW′‖. All matrices keep the same ratio, k = ⌊x·d₁d₂ / (d₁ + d₂)⌋. This is the paper's variant
without its update of the remaining layers and without LoRA.

Where this differs from paper and code: where the Cholesky of a rank-deficient Gram fails, S comes from its
eigendecomposition, both with a relative ridge; each matrix is solved on its smaller side, which has the same optimum;
in small models, where rounding down leaves more than 0.5 % of the budget, single ranks are added.
"""

from dataclasses import dataclass

from layershare.methods.private import UniformLowRank


@dataclass(frozen=True)
class SvdLlm(UniformLowRank):
    """SVD-LLM has no options."""
