"""LoRD: project every matrix onto the main directions of its own outputs.

Paper: Kaushal, Vaidhya, Rish, "LORD: Low Rank Decomposition Of Monolingual Code LLMs For One-Shot Compression", arXiv
2309.14021. With V_k the top k eigenvectors of the covariance of the outputs Y = XW, W′ = W V_kV_kᵀ, stored as the
factors W V_k and V_kᵀ. No matrix is inverted. All matrices keep the same ratio, k = ⌊x·d₁d₂ / (d₁ + d₂)⌋.

Where this differs
- A covariance is free of the mean of Y, which must then come back as a bias, (1 − V_kV_kᵀ)E[y]. Most of today's models
  have no biases to put it in, so nothing is removed here: V_k are eigenvectors of the second moment YᵀY = WᵀGW. Without
  a bias this is the best projection there is; it is even the best matrix of rank k, so `lord` finds what `svd-llm`
  finds, by another way.
- The paper chooses for each model which layers are decomposed and how far; here the ratio is the same everywhere. In
  small models, where rounding down leaves more than 0.5 % of the budget, single ranks are added.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from layershare.formulas.linalg import Factors, share_output
from layershare.methods.low_rank import UniformLowRank, as_factors
from layershare.plan.edits import Share


@dataclass(frozen=True)
class Lord(UniformLowRank):
    """LoRD has no options of its own."""

    def factors(self, share: Share, weights: Sequence[Tensor], metrics: Sequence[Tensor | None]) -> Factors:
        """W V_k and V_kᵀ, also where the input side would be the smaller problem."""
        if share.private_rank or len(weights) > 1:
            return super().factors(share, weights, metrics)
        factors = share_output(weights, metrics, share.rank)
        return as_factors(share, factors.coefs[0], factors.basis, factors.error, factors.spectrum)
