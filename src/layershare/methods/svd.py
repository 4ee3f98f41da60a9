"""Plain truncated SVD: the baseline that ignores what the model does on text.

W = UΣVᵀ, W′ = U_kΣ_kV_kᵀ (Eckart and Young, 1936), the same ratio for every matrix, k = ⌊x·d₁d₂ / (d₁ + d₂)⌋. Σ is
split so that both factors have equal norms. In small models, where rounding down leaves more than 0.5 % of the budget,
single ranks are added.
"""

from dataclasses import dataclass
from typing import ClassVar

from layershare.calibrate.stats import Kind
from layershare.methods.private import UniformLowRank


@dataclass(frozen=True)
class Svd(UniformLowRank):
    """Plain SVD has no options of its own."""

    uses: ClassVar[frozenset[Kind]] = frozenset()  # every input direction counts the same
