"""Groups of one: plain low rank, which every method falls back to for what it does not share."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from layershare.methods.method import Method
from layershare.model.arch import WRITERS, Spec
from layershare.plan.budget import Budget
from layershare.plan.edits import Share, Side
from layershare.plan.ranks import Group, uniform
from layershare.solve.linalg import Factors, low_rank


def natural_side(role: str) -> Side:
    """The side of a role that lies in the residual stream."""
    return "output" if role in WRITERS else "input"


def solve_private(share: Share, weight: Tensor, gram: Tensor | None) -> Factors:
    """The best rank-k pair for one matrix, W ≈ left · right, as basis and coefficients of the group's side."""
    left, right, error = low_rank(weight, gram, share.rank)
    if share.side == "input":
        return Factors(left, (right,), error)
    return Factors(right, (left,), error)


@dataclass(frozen=True)
class UniformLowRank(Method):
    """Every target for itself, all with the same ratio."""

    def plan(self, spec: Spec, budget: Budget) -> tuple[Share, ...]:
        """The same ratio for every matrix."""
        groups = [Group(linear.role, (linear.layer,), natural_side(linear.role)) for linear in spec.linears]
        return uniform(spec, groups, budget)

    def solve(self, share: Share, weights: Sequence[Tensor], grams: Sequence[Tensor | None]) -> Factors:
        """The optimum for one matrix under its Gram."""
        return solve_private(share, weights[0], grams[0])
