"""WeLore: plain SVD with one global threshold, so that every matrix gets the rank that its own spectrum suggests.

Paper: Jaiswal, Yin, Zhang, Liu, Zhao, Tian, Wang, "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge
from Low-Rank Gradients", ICML 2025, arXiv 2407.11239. The singular values of every matrix are normalised to
s = (σ − σ_min) / (σ_max − σ_min); a matrix keeps those with s ≥ t, the threshold t being the same for all. Matrices
whose spectrum falls fast become low rank (the paper's LRCs); the others (N-LRCs) stay dense, because factors would not
save anything. What is kept is U_kΣ_kV_kᵀ.

Where this differs from paper and code
- t is the one that uses the budget. The code has a table of thresholds for reductions of rank in two models; counted
  here are the parameters that are stored, k(d₁ + d₂) or, where that is not less, the d₁d₂ of the dense matrix.
- So a matrix stays dense exactly where factors do not pay; the code's default asks for half of the rank to go, which is
  the same for square matrices alone.
- The LRCs are not fine-tuned. In small models, where the next singular value takes more than 0.5 % of the budget, ranks
  are added while they fit, first where the next s is the largest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layershare.calibrate.stats import Statistic
from layershare.methods.low_rank import LowRank
from layershare.model.arch import Spec
from layershare.plan.budget import Budget
from layershare.plan.edits import Share
from layershare.plan.evidence import Evidence
from layershare.plan.ranks import Cost, allocate, group_cost, private_groups


@dataclass(frozen=True)
class WeLore(LowRank):
    """WeLore has no options of its own."""

    @property
    def uses(self) -> frozenset[Statistic]:
        """No statistics."""
        return frozenset()

    @property
    def adaptive(self) -> bool:
        """It plans by what it measures."""
        return True

    def plan(self, spec: Spec, budget: Budget, evidence: Evidence) -> tuple[Share, ...]:
        """The ranks above the lowest threshold that the budget allows."""
        groups = private_groups(spec.linears, self.pivot)
        spectra = []
        for done, group in enumerate(groups):
            evidence.progress(done, len(groups))
            spectra.append(normalised(evidence.spectrum(group, weighted=False).sqrt()))
        costs = [group_cost(spec, group) for group in groups]
        ranks = threshold_ranks(spectra, costs, budget.parameters)
        following = [
            float(values[rank]) if rank < len(values) else 0.0 for values, rank in zip(spectra, ranks, strict=True)
        ]
        return allocate(spec, groups, ranks, budget.parameters, following, self.multiple)


def normalised(values: Tensor) -> Tensor:
    """Singular values as s = (σ − σ_min) / (σ_max − σ_min); where all are equal, all are 1."""
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else torch.ones_like(values)


def threshold_ranks(spectra: Sequence[Tensor], costs: Sequence[Cost], parameters: int) -> list[int]:
    """How many values of each spectrum lie above the lowest threshold common to all that keeps to `parameters`.

    A matrix takes what its cost says of as many values. Spectra fall.
    """
    steps, owners = [], []
    for i, (values, cost) in enumerate(zip(spectra, costs, strict=True)):
        sizes = torch.tensor([cost.size(rank) for rank in range(len(values) + 1)], device=values.device)
        steps.append(sizes.diff())
        owners.append(torch.full_like(steps[-1], i))
    order = torch.cat(list(spectra)).argsort(descending=True, stable=True)
    count = int((torch.cat(steps)[order].cumsum(0) <= parameters).sum())
    return torch.bincount(torch.cat(owners)[order[:count]], minlength=len(spectra)).tolist()
