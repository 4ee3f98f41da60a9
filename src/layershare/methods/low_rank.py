"""Methods whose edits are `Share`s: what they have in common, from the Grams to the tensors of the checkpoint."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from layershare.formulas.linalg import (
    Factors,
    low_rank,
    pivot_factors,
    relative_error,
    share_and_own,
    share_input,
    share_output,
)
from layershare.formulas.two_sided import seen_plainly, seen_through
from layershare.model.arch import Linear, Spec
from layershare.plan.budget import Budget
from layershare.plan.edits import Share
from layershare.plan.evidence import Evidence
from layershare.plan.layout import named_tensors
from layershare.plan.method import Method, Solution, Unit
from layershare.plan.ranks import private_groups, uniform
from layershare.values import Count, Flag

SPECTRUM_POINTS = 64
_PIVOT = "Store the bases in pivoted form: k² parameters fewer each, so that ranks are higher at the same size."
_MULTIPLE = "Ranks are multiples of this: kernels, quantization in groups and tensor parallelism want 8 to 128."


@dataclass(frozen=True)
class LowRank(Method):
    """A method whose edits are `Share`s."""

    solves: ClassVar[tuple[type, ...]] = (Share,)
    # Attribute docstrings of a base class are not found.
    pivot: Annotated[Flag, Field(description=_PIVOT)] = False
    multiple: Annotated[Count, Field(description=_MULTIPLE)] = 1

    def metric(self, evidence: Evidence, linear: Linear) -> Tensor | None:
        """What errors in a linear's inputs count, d_in × d_in: their Gram, `None` for all directions the same."""
        return evidence.gram(linear) if "inputs" in self.uses else None

    def factors(self, share: Share, weights: Sequence[Tensor], metrics: Sequence[Tensor | None]) -> Factors:
        """The factors of one group, `weights` n of d_in × d_out in the order of its places: the optimum.

        With private directions beside, the best that alternating finds.
        """
        if share.private_rank:
            return share_and_own(weights, metrics, share.rank, share.private_rank, share.side)
        if len(weights) > 1 and share.side == "output":
            return share_output(weights, metrics, share.rank)
        if len(weights) > 1:
            made = share_input(weights, metrics, share.rank)  # whose error is that under the pooled Gram
            rests = (weight.double() - made.basis @ coef for weight, coef in zip(weights, made.coefs, strict=True))
            return replace(made, error=relative_error(rests, weights, metrics))
        return as_factors(share, *low_rank(weights[0], metrics[0], share.rank))

    def solve(self, unit: Unit, evidence: Evidence) -> Solution:
        """The factors of a group, as layers hold them."""
        (share,) = unit.edits
        assert isinstance(share, Share)
        linears = [evidence.spec.linear(*place) for place in share.places]
        weights = [evidence.weight(linear) for linear in linears]
        metrics = [self.metric(evidence, linear) for linear in linears]
        # A basis on the output side would stand on the right of several different roots.
        one_root = share.side == "input" or len(linears) == 1
        seen, roots = self.weighed(evidence, linears, weights) if one_root else (weights, [])
        factors = self.weighed_factors(share, seen, roots, metrics)
        return solution(evidence.spec, share, factors, weights[0].dtype)

    def weighed_factors(
        self, share: Share, seen: Sequence[Tensor], roots: Sequence[Tensor], metrics: Sequence[Tensor | None]
    ) -> Factors:
        """The factors of a group, of its weights as they are `seen` through `roots`, if there are any."""
        factors = self.factors(share, seen, metrics)
        return seen_plainly(factors, roots, share.side) if roots else factors

    def weighed(
        self, evidence: Evidence, linears: Sequence[Linear], weights: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The weights seen through the roots of their outputs' metrics, and the roots; as they are, without."""
        roots = [root for linear in linears if (root := self.outer_root(evidence, linear)) is not None]
        return ([seen_through(*each) for each in zip(weights, roots, strict=True)] if roots else weights), roots


@dataclass(frozen=True)
class UniformLowRank(LowRank):
    """Every target for itself, all with the same ratio."""

    def plan(self, spec: Spec, budget: Budget, evidence: Evidence) -> tuple[Share, ...]:
        """The same ratio for every matrix."""
        return uniform(spec, private_groups(spec.linears, self.pivot), budget, self.multiple)


def as_factors(share: Share, left: Tensor, right: Tensor, error: float, spectrum: Tensor | None = None) -> Factors:
    """One matrix W ≈ left · right as basis and coefficients on the side of its group of one."""
    basis, coef = (left, right) if share.side == "input" else (right, left)
    return Factors(basis, (coef,), error, spectrum)


def solution(spec: Spec, share: Share, factors: Factors, dtype: torch.dtype) -> Solution:
    """The factors of a group in its form and as layers hold them, with error, spectrum and largest pivoted number.

    Raises `LayershareError` if one does not fit the dtype.
    """
    facts: dict[str, Any] = {"error": factors.error}
    facts["spectrum"] = None if factors.spectrum is None else sampled(factors.spectrum, share.rank)
    if share.pivot:
        factors = pivot_factors(factors, share.side)
        facts["largest"] = float(factors.basis.abs().max())
    names = [spec.linear(*place).name for place in share.places]
    private = factors.own or [()] * len(names)
    own = {name: [coef, *pair] for name, coef, pair in zip(names, factors.coefs, private, strict=True)}
    return Solution(named_tensors(spec, share, factors.basis, own, dtype, factors.order), {share.id: facts})


def sampled(spectrum: Tensor, rank: int) -> dict[str, list[Any]]:
    """Some points of a spectrum for people: component numbers (from 1) and their shares of the sum, four digits each.

    All of a short spectrum; of a longer one numbers spaced evenly on a logarithmic scale, and the last that is kept.
    """
    n = len(spectrum)
    points = range(1, n + 1)
    if n > SPECTRUM_POINTS:
        points = torch.logspace(0, math.log10(n), SPECTRUM_POINTS, dtype=torch.float64).round().long().tolist()
    index = sorted({*points, rank})
    shares = spectrum / (spectrum.sum() or 1)
    return {"index": index, "share": [float(f"{float(shares[i - 1]):.4g}") for i in index]}
