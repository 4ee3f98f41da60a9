"""Methods that treat every matrix for itself, all with the same ratio."""

from dataclasses import dataclass

from layershare.methods.evidence import Evidence
from layershare.methods.method import LowRank
from layershare.model.arch import Spec
from layershare.plan.budget import Budget
from layershare.plan.edits import Share
from layershare.plan.ranks import private_groups, uniform


@dataclass(frozen=True)
class UniformLowRank(LowRank):
    """Every target for itself, all with the same ratio."""

    def plan(self, spec: Spec, budget: Budget, evidence: Evidence | None) -> tuple[Share, ...]:
        """The same ratio for every matrix."""
        return uniform(spec, private_groups(spec.linears, self.pivot), budget)
