"""What a method is: options, a plan and a solution."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from layershare.model.arch import Spec
from layershare.plan.budget import Budget
from layershare.plan.edits import Share
from layershare.solve.linalg import Factors


@dataclass(frozen=True)
class Method(ABC):
    """A compression method: a frozen dataclass of its options, registered in `methods/__init__.py`."""

    @property
    def uses_grams(self) -> bool:
        """Whether `solve` needs calibration; without it every Gram matrix is `None`."""
        return True

    @abstractmethod
    def plan(self, spec: Spec, budget: Budget) -> tuple[Share, ...]:
        """Choose the edits. Never exceeds the budget; raises `LayershareError` if the options do not fit the model."""

    @abstractmethod
    def solve(self, share: Share, weights: Sequence[Tensor], grams: Sequence[Tensor | None]) -> Factors:
        """The factors of one group: `weights` n of d_in × d_out, `grams` n of d_in × d_in, in layer order."""

    def refits(self, fraction: float) -> bool:
        """Whether coefficients are fitted again to what the compressed layers put out, at this fraction of targets."""
        return False
