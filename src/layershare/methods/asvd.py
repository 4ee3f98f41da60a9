"""ASVD: activation-aware SVD, every matrix for itself, with ranks by how much each one's truncation hurts.

Paper: Yuan, Shang, Song, Wu, Yan, Sun, "ASVD: Activation-aware Singular Value Decomposition for Compressing Large
Language Models", arXiv 2312.05821. In row convention, S is diagonal with Sᵢᵢ = (mean |Xᵢ|)^α, α = ½; SW = UΣVᵀ and
W′ = S⁻¹U_kΣ_kV_kᵀ. Sensitivity-based truncation rank search (STRS): every matrix alone is truncated to a few ratios of
its parameters, and the perplexity of the calibration text measured each time. All (matrix, ratio) pairs are sorted by
it, and a binary search finds the threshold: pairs below it are carried out, each matrix with the lowest of its ratios
among them; a matrix that has none stays dense.

Cost: one decomposition per matrix and `ratios` × `samples` runs of the model on one block of text. For a model of 7
billion parameters (224 matrices) the defaults are 1,792 runs. The model must fit in memory.

Where this differs
- from paper and code: there are 4 evenly spaced ratios by default; the paper's 0.1, 0.2, … 0.9 are `ratios=9`. The
  matrix whose pair meets the threshold gets the largest rank that the budget allows rather than that of its ratio, so
  that the budget is used up to 0.5 %. U_k comes from the eigenproblem of the smaller side, not from an SVD.
- from the code: it treats the output head as well, which is not a target here; it keeps S from zero by adding 10⁻⁶,
  here the ridge of the whitening does; its decomposition is randomized (`torch.svd_lowrank`) and done anew for every
  ratio, here it is exact and serves all ratios.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from layershare.errors import LayershareError
from layershare.formulas.linalg import low_rank
from layershare.methods.low_rank import LowRank
from layershare.methods.probe import Probe, truncated
from layershare.model.arch import Linear, Spec
from layershare.plan.budget import Budget, target_parameters
from layershare.plan.edits import Share
from layershare.plan.evidence import Evidence
from layershare.plan.ranks import allocate, matrix_cost, private_groups
from layershare.values import Count, UpTo1, Whole


@dataclass(frozen=True)
class Truncation:
    """One linear truncated to one rank, all others whole, and the loss that the text then has."""

    linear: Linear
    rank: int
    loss: float


@dataclass(frozen=True)
class Asvd(LowRank):
    """Options of ASVD."""

    searches: ClassVar[bool] = True
    sizes: ClassVar[str] = "down to the lowest of `ratios`"
    alpha: UpTo1 = 0.5
    """The exponent α of the scaling."""
    ratios: Annotated[Whole, Field(ge=1, le=1000)] = 4
    """How many ratios are tried per matrix, evenly spaced below 1."""
    samples: Count = 2
    """Blocks of the calibration text on which each is measured."""

    @property
    def adaptive(self) -> bool:
        """It plans by what it measures."""
        return True

    def runs(self, spec: Spec) -> int:
        """Every matrix at every ratio on every sample."""
        return len(spec.linears) * self.ratios * self.samples

    def require(self, spec: Spec, budget: Budget) -> None:
        """Raise `LayershareError` if the lowest ratio of every matrix does not meet the budget."""
        if sum(matrix_cost(x, self.pivot).size(self._ranks(x)[0]) for x in spec.linears) > budget.parameters:
            raise LayershareError(
                "The lowest ratio that asvd tries is not low enough; keep more, or set a higher 'ratios'."
            )

    def plan(self, spec: Spec, budget: Budget, evidence: Evidence) -> tuple[Share, ...]:
        """Measure every truncation, and carry out the least harmful ones until the budget is met."""
        if budget.fraction == 1:
            return ()
        probe = Probe(evidence, self.samples)
        truncations: list[Truncation] = []
        for done, linear in enumerate(spec.linears):
            evidence.progress(done, len(spec.linears))
            truncations += self._truncations(linear, evidence, probe)
        return search(spec, budget, truncations, self.pivot, self.multiple)

    def metric(self, evidence: Evidence, linear: Linear) -> Tensor:
        """S², which takes the place of the Gram."""
        return torch.diag(evidence.magnitude(linear).double() ** (2 * self.alpha))

    def _ranks(self, linear: Linear) -> list[int]:
        """The ranks of the ratios that are tried, the lowest first."""
        cost = matrix_cost(linear, self.pivot)
        ratios = [Fraction(step, self.ratios + 1) for step in range(1, self.ratios + 1)]
        return [max(1, int(cost.rank(ratio * cost.whole))) for ratio in ratios]

    def _truncations(self, linear: Linear, evidence: Evidence, probe: Probe) -> Iterator[Truncation]:
        weight, ranks = evidence.weight(linear), self._ranks(linear)
        left, right, *_ = low_rank(weight, self.metric(evidence, linear), ranks[-1])
        factors = left.to(weight.dtype), right.to(weight.dtype)
        name = evidence.spec.weight_name(linear)
        for rank in ranks:
            yield Truncation(linear, rank, probe.loss({name: truncated(linear, factors, rank)}))


def search(
    spec: Spec, budget: Budget, truncations: Sequence[Truncation], pivot: bool = False, multiple: int = 1
) -> tuple[Share, ...]:
    """STRS: the least harmful truncations, as few of them as meet the budget, which all of them together must."""
    ordered = sorted(truncations, key=lambda each: each.loss)
    costs = {x: matrix_cost(x, pivot) for x in spec.linears}

    def ranks(count: int) -> dict[Linear, int]:
        lowest: dict[Linear, int] = {}
        for each in ordered[:count]:
            lowest[each.linear] = min(each.rank, lowest.get(each.linear, each.rank))
        return lowest

    def parameters(count: int) -> int:
        return target_parameters(spec) - sum(x.parameters - costs[x].size(rank) for x, rank in ranks(count).items())

    count = bisect_left(range(len(ordered) + 1), True, key=lambda count: parameters(count) <= budget.parameters)
    if not count:
        return ()
    chosen, last = ranks(count), ordered[count - 1].linear
    linears = sorted(chosen, key=lambda linear: linear != last)  # that of the threshold first
    exact = [Fraction(chosen[linear]) for linear in linears]
    left = budget.parameters - parameters(count)
    exact[0] = costs[last].rank(Fraction(costs[last].size(chosen[last]) + left))
    available = budget.parameters - sum(x.parameters for x in spec.linears if x not in chosen)
    return allocate(spec, private_groups(linears, pivot), exact, available, multiple=multiple)
