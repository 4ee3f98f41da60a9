"""D-Rank: Basis Sharing with more rank for the groups that hold more information.

Paper: Mi, Sun, Zhang, Huang, "Layer-wise dynamic rank for compressing large language models", arXiv 2509.25622. In its
symbols: with pᵢ = σᵢ² / Σσⱼ² over the singular values of the scaled matrix S_gW_g of group g, the effective rank is
R_eff(g) = exp(−Σpᵢ log pᵢ). Minimising ΣR_eff(g)/k_g under Σk_gω = T_budget, where ω = d₁ + n·d₂ is the cost of one
rank, gives k_g = T_budget / Σ√(R_eff(j)·ω) · √R_eff(g) / √ω for the groups of one role. Then a fraction β of what W_Q
and W_K have goes to W_V, whose effective rank is far higher, in equal parts for all its layers. Groups, bases,
coefficients and the refit from 40 % removed on are those of Basis Sharing; with grouped-query attention every matrix is
for itself (n = 1).

Where this differs
- What moves from Q and K to V is parameters, not ranks, which keeps the size where V is narrower (the code does so for
  LLaMA-3); without grouped-query attention both are the same. What V cannot take stays with Q and K, in proportion, as
  in the code.
- A group whose factors would not be smaller than its matrices stays dense, and what it cannot use goes to the others of
  its role. The code caps at rank min(d₁, d₂), where factors take more than the matrices.
- From the code: it keeps the uniform rank for gate, and for o, up and down where that has the smaller truncation error,
  and moves 20 %. The paper says neither, and finds β between 0.3 and 0.4 best; 0.35 is the default here.
- Where q, k and v are one matrix, nothing moves. In small models, where rounding down leaves more than 0.5 % of the
  budget, single ranks are added.
- All else that differs from Basis Sharing's paper and code is in `basis_sharing.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from layershare.methods.basis_sharing import REFIT_AT, sharing_groups
from layershare.methods.low_rank import LowRank
from layershare.model.arch import Spec
from layershare.plan.budget import Budget
from layershare.plan.edits import Share
from layershare.plan.evidence import Evidence
from layershare.plan.ranks import Group, allocate, group_cost
from layershare.values import Below1, Count, Names


@dataclass(frozen=True)
class DRank(LowRank):
    """Options of D-Rank."""

    group_size: Count | None = None
    """Layers per group (n); without, 2, or 1 with grouped-query attention."""
    shared: Names | None = None
    """Roles whose basis is shared; without, the choice of Basis Sharing's authors."""
    beta: Below1 = 0.35
    """The fraction of Q's and K's parameters that goes to V."""

    @property
    def adaptive(self) -> bool:
        """It plans by what it measures."""
        return True

    def groups(self, spec: Spec) -> list[Group]:
        """The groups of layers. Raises `LayershareError` for roles that the model does not have."""
        return sharing_groups(spec, self.shared, self.group_size or (1 if spec.grouped_query else 2), self.pivot)

    def require(self, spec: Spec, budget: Budget) -> None:
        """Raise `LayershareError` for roles that the model does not have."""
        self.groups(spec)

    def plan(self, spec: Spec, budget: Budget, evidence: Evidence) -> tuple[Share, ...]:
        """The same ratio for every role but q, k and v; within a role, rank by effective rank."""
        groups = self.groups(spec)
        costs = {group: group_cost(spec, group) for group in groups}
        limits = {group: cost.whole for group, cost in costs.items()}
        sizes: dict[Group, Fraction] = {}
        for done, role in enumerate(spec.roles):
            evidence.progress(done, len(spec.roles))
            own = [group for group in groups if group.places[0].role == role]
            ranks = [effective_rank(evidence.spectrum(group, weighted=True)) for group in own]
            weights = [(rank * costs[group].linear) ** 0.5 for group, rank in zip(own, ranks, strict=True)]
            limit = [limits[group] for group in own]
            sizes |= zip(own, in_proportion(budget.fraction * sum(limit), weights, limit), strict=True)
        sizes = to_v(sizes, limits, Fraction(self.beta))
        exact = [costs[group].rank(sizes[group]) for group in groups]
        return allocate(spec, groups, exact, budget.parameters, multiple=self.multiple)

    def refits(self, fraction: float) -> bool:
        """From 40 % removed on."""
        return fraction <= REFIT_AT


def effective_rank(spectrum: Tensor) -> float:
    """R_eff = exp(−Σ p log p), p = σ²/Σσ² (Eq. 1 and 2), of squared singular values."""
    share = spectrum / spectrum.sum().clamp(min=torch.finfo(spectrum.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())


def in_proportion(total: Fraction, weights: Sequence[float], limits: Sequence[int]) -> list[Fraction]:
    """Parts of `total` in proportion to `weights`, none above its limit; the others get what one cannot take.

    With weights √(R_eff·ω) these are the parameters k_gω of Eq. 7.
    """
    parts, exact = [Fraction(0)] * len(limits), [Fraction(weight) for weight in weights]
    left = sum(exact)
    for i in sorted(range(len(limits)), key=lambda i: limits[i] / exact[i]):  # the first to reach its limit first
        parts[i] = min(total * exact[i] / left, Fraction(limits[i]))
        total -= parts[i]
        left -= exact[i]
    return parts


def to_v(sizes: dict[Group, Fraction], limits: dict[Group, int], beta: Fraction) -> dict[Group, Fraction]:
    """Parameters after V has got the fraction β of Q's and K's (Eq. 8 to 12), as far as its limits allow."""
    giving = [group for group in sizes if group.places[0].role in ("q", "k")]
    taking = [group for group in sizes if group.places[0].role == "v"]
    offered = beta * sum(sizes[group] for group in giving)
    layers = sum(len(group.places) for group in taking)
    taken = {group: min(offered * len(group.places) / layers, limits[group] - sizes[group]) for group in taking}
    moved = beta * sum(taken.values()) / offered if offered else Fraction(0)
    return (
        sizes
        | {group: sizes[group] * (1 - moved) for group in giving}
        | {group: sizes[group] + extra for group, extra in taken.items()}
    )
