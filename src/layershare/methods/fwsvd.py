"""FWSVD: low rank weighted by the Fisher information of each row, every matrix for itself.

Paper: Hsu, Hua, Chang, Lou, Shen, Jin, "Language model compression with weighted low-rank factorization", ICLR 2022,
arXiv 2207.00112. The Fisher information of a weight is the mean of its squared gradient, I_w = E[(∂L/∂w)²]; a row's
importance is Î = diag(√Σⱼ I_wᵢⱼ). With ÎW = UΣVᵀ, W′ = Î⁻¹U_kΣ_kV_kᵀ minimises ‖ÎW − ÎW′‖. All matrices keep the same
ratio, k = ⌊x·d₁d₂ / (d₁ + d₂)⌋.

Where this differs
- ‖ÎW − ÎW′‖ is the activation-weighted error of the other methods with Î² in place of the Gram, so it is solved by the
  same function: on the smaller side, which has the same optimum, and with its relative ridge, so that rows which no
  gradient reached do no harm. (The authors published no code.)
- The paper takes the gradient of every sample of a task that the model was fine-tuned for; here a sample is a block of
  the calibration text, and L its mean loss of the next token.
- The factors are not trained afterwards. In small models, where rounding down leaves more than 0.5 % of the budget,
  single ranks are added.
"""

from dataclasses import dataclass

from torch import Tensor

from layershare.calibrate.stats import Statistic
from layershare.methods.low_rank import UniformLowRank
from layershare.model.arch import Linear
from layershare.plan.evidence import Evidence


@dataclass(frozen=True)
class FwSvd(UniformLowRank):
    """FWSVD has no options of its own."""

    @property
    def uses(self) -> frozenset[Statistic]:
        """Squared gradients."""
        return frozenset({"fisher"})

    def metric(self, evidence: Evidence, linear: Linear) -> Tensor:
        """G = Î²."""
        return evidence.fisher(linear).diag()
