"""Plain truncated SVD: the baseline that ignores what the model does on text.

W = UΣVᵀ, W′ = U_kΣ_kV_kᵀ (Eckart and Young, 1936), the same ratio for every matrix, k = ⌊x·d₁d₂ / (d₁ + d₂)⌋. Σ is
split so that both factors have equal norms. In small models, where rounding down leaves more than 0.5 % of the budget,
single ranks are added.
"""

from dataclasses import dataclass

from layershare.calibrate.stats import Statistic
from layershare.methods.low_rank import UniformLowRank


@dataclass(frozen=True)
class Svd(UniformLowRank):
    """Plain SVD has no options of its own."""

    @property
    def uses(self) -> frozenset[Statistic]:
        """No statistics."""
        return frozenset()
