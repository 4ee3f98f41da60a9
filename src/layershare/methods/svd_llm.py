"""SVD-LLM: truncation-aware low rank, every matrix for itself; Basis Sharing with groups of one.

Paper: Wang, Zheng, Wan, Zhang, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model
Compression", ICLR 2025, arXiv 2403.07378. With S from SᵀS = XᵀX, SW = UΣVᵀ and W′ = S⁻¹U_kΣ_kV_kᵀ: dropping σᵢ costs
exactly σᵢ in ‖XW − XW′‖. All matrices keep the same ratio, k = ⌊x·d₁d₂ / (d₁ + d₂)⌋. This is the variant that the paper
calls SVD-LLM (W), as other papers compare with; its full method then trains both factors with LoRA.

With `refit: true` in the recipe the update of the paper's first versions follows, which the code still has (its step
2): layer after layer, the second factor C of W′ = BC is fitted again to the inputs X′ that the compressed layers before
really give, C = (BᵀG′B + λ1)⁻¹BᵀG′W with G′ = X′ᵀX′. It is off by default because the published (W) is without it; but
`basis-sharing` does the same from 40 % removed on, so compare like with like there.

Where this differs from paper and code: where the Cholesky of a rank-deficient Gram fails, S comes from its
eigendecomposition, both with a relative ridge; each matrix is solved on its smaller side, which has the same optimum;
in small models, where rounding down leaves more than 0.5 % of the budget, single ranks are added. The refit sees the
inputs that the compressed attention gives to the same block's MLP; the code takes those of the dense attention.
"""

from dataclasses import dataclass

from layershare.methods.low_rank import UniformLowRank


@dataclass(frozen=True)
class SvdLlm(UniformLowRank):
    """SVD-LLM has no options of its own."""
