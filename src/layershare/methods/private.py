"""Solving groups, and the plan that gives every matrix a group of one with the same ratio."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from layershare.methods.method import Method
from layershare.model.arch import WRITERS, Spec
from layershare.plan.budget import Budget
from layershare.plan.edits import Share, Side
from layershare.plan.ranks import LayerGroup, uniform
from layershare.solve.linalg import Factors, low_rank, share_input, share_output


def natural_side(role: str) -> Side:
    """The side of a role that lies in the residual stream."""
    return "output" if role in WRITERS else "input"


def solve_private(share: Share, weight: Tensor, gram: Tensor | None) -> Factors:
    """The best rank-k pair for one matrix, W ≈ left · right, as basis and coefficients of the group's side."""
    left, right, error = low_rank(weight, gram, share.rank)
    if share.side == "input":
        return Factors(left, (right,), error)
    return Factors(right, (left,), error)


def solve_group(share: Share, weights: Sequence[Tensor], grams: Sequence[Tensor | None]) -> Factors:
    """The optimum for a group: a shared basis on the group's side, or plain low rank for a group of one."""
    if len(weights) == 1:
        return solve_private(share, weights[0], grams[0])
    solve = share_input if share.side == "input" else share_output
    return solve(weights, grams, share.rank)


@dataclass(frozen=True)
class UniformLowRank(Method):
    """Every target for itself, all with the same ratio."""

    def plan(self, spec: Spec, budget: Budget) -> tuple[Share, ...]:
        """The same ratio for every matrix."""
        groups = [LayerGroup(linear.role, (linear.layer,), natural_side(linear.role)) for linear in spec.linears]
        return uniform(spec, groups, budget)

    def solve(self, share: Share, weights: Sequence[Tensor], grams: Sequence[Tensor | None]) -> Factors:
        """The optimum under the Grams."""
        return solve_group(share, weights, grams)
