"""LaCo: collapse runs of layers into their first, from the top down, wherever the model's output stays similar.

Paper: Yang, Cao, Zhao, "LaCo: Large Language Model Pruning via Layer Collapse", EMNLP Findings 2024, arXiv 2402.11187.
Reserving differences while seeking common, layer l takes the place of itself and the m layers after it with
θ*_l = θ_l + Σₖ(θ_{l+k} − θ_l), k = 1 … m. From l = H − C down to L: merge the C layers from l on (m = C − 1); if the
cosine between the final hidden states of the merged and of the original model, on a few samples, is above the threshold
T, keep the merge and go on I layers below, otherwise one below. A merged layer may be merged again: every layer that is
left is a linear combination of the original ones.

Cost: at most one run of the model on `samples` blocks of text per position and threshold; a model that was tried is not
run again. The model must fit in memory.

Where this differs
- from paper and code: T is lowered by 0.05 at a time, each time from the original model, until the budget is met; the
  paper sets T by hand. The last merge takes fewer than C layers if that is enough, so that the model lands at the
  nearest size below the budget.
- from the code: it adds the differences to weights that it is changing, so that θ*_l becomes θ_{l+m}, the last layer
  alone; this is the paper's sum. It merges matrices and keeps layer l's norms; here, as the paper says, all parameters
  of a layer are merged. Its samples are a few words of an encyclopedia; here they are the first blocks of the
  calibration text. After a merge it tries places that are closer to the top than C layers as long as they exist; here
  every try has C layers. As in the code, the cosine is that of all states of a sample taken as one vector.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from layershare.calibrate.stats import Statistic
from layershare.errors import LayershareError
from layershare.methods.merging import Block, combine, merges, require_alike, require_mergeable, unmerged
from layershare.methods.probe import Probe
from layershare.model.arch import Spec
from layershare.plan.budget import Budget, allows
from layershare.plan.edits import Merge
from layershare.plan.evidence import Evidence
from layershare.plan.method import Method
from layershare.values import MOST, Count, Number, Whole

STEP = 0.05
"""By how much the threshold is lowered."""


@dataclass(frozen=True)
class LaCo(Method):
    """Options of LaCo."""

    searches: ClassVar[bool] = True
    sizes: ClassVar[str] = "steps of a block"
    merged: Annotated[Whole, Field(ge=2, le=MOST)] = 4
    """Layers that one merge makes one of (C)."""
    interval: Count = 2
    """How far below an accepted merge the next one starts (I)."""
    lowest: Annotated[Whole, Field(ge=0, le=MOST)] = 0
    """No merge starts below this layer (L), numbered from 0."""
    highest: Count | None = None
    """This layer (H) stays, and so do those above it, as in the paper's algorithm; without, the last one."""
    threshold: Annotated[Number, Field(ge=-1, le=1)] = 0.95
    """The similarity that a merge must reach at first (T)."""
    samples: Count = 4
    """Blocks of the calibration text on which the models are compared."""

    @property
    def uses(self) -> frozenset[Statistic]:
        """No statistics."""
        return frozenset()

    @property
    def adaptive(self) -> bool:
        """It plans by what it measures."""
        return True

    def runs(self, spec: Spec) -> int:
        """At least the original and a merge at every place, on every sample; what more depends on the model."""
        return (1 + spec.n_layers) * self.samples

    def require(self, spec: Spec, budget: Budget) -> None:
        """Raise `LayershareError` if layers differ in shape, or if the range has no room for a merge or for enough."""
        require_alike(spec)
        highest = self._highest(spec)
        if not self.lowest + self.merged <= highest < spec.n_layers:
            raise LayershareError(
                f"laco merges {self.merged} layers from {self.lowest} on and below {highest}, for which the model's "
                f"{spec.n_layers} layers leave no room; lower 'merged' or change the range."
            )
        require_mergeable(spec, budget, range(self.lowest, highest))

    def plan(self, spec: Spec, budget: Budget, evidence: Evidence) -> tuple[Merge, ...]:
        """Collapse at lower and lower thresholds until the budget is met.

        Raises `LayershareError` if it is not although every merge is accepted.
        """
        if allows(budget, spec, ()):
            return ()
        probe = Probe(evidence, self.samples)
        original = probe.final_states(()).flatten(1).float()
        known: dict[tuple[Merge, ...], float] = {}

        def similarity(edits: tuple[Merge, ...]) -> float:
            if edits not in known:
                states = probe.final_states(edits).flatten(1).float()
                known[edits] = torch.cosine_similarity(original, states).mean().item()
            return known[edits]

        threshold = self.threshold
        while threshold > -1 - STEP:
            blocks = unmerged(spec.n_layers)
            position = self._highest(spec) - self.merged
            while position >= self.lowest:
                candidates = [merges(collapsed(blocks, position, m)) for m in range(1, self.merged)]
                m = next((m for m, edits in enumerate(candidates, 1) if allows(budget, spec, edits)), self.merged - 1)
                accepted = similarity(candidates[m - 1]) > threshold
                if accepted:
                    blocks = collapsed(blocks, position, m)
                    if allows(budget, spec, merges(blocks)):
                        return merges(blocks)
                gone = spec.n_layers - len(blocks)
                below = position - (self.interval if accepted else 1)
                position = min(below, self._highest(spec) - gone - self.merged)
            threshold -= STEP
        raise LayershareError(
            "laco cannot make this model so small with these options; keep more, or lower 'interval'."
        )

    def _highest(self, spec: Spec) -> int:
        return spec.n_layers - 1 if self.highest is None else self.highest


def collapsed(blocks: list[Block], position: int, m: int) -> list[Block]:
    """The blocks with the m after a position merged into it: θ* = θ_l + Σₖ(θ_{l+k} − θ_l) = (1 − m)θ_l + Σₖθ_{l+k}."""
    first, others = blocks[position], blocks[position + 1 : position + 1 + m]
    merged = combine([(1.0 - m, first), *((1.0, other) for other in others)])
    return [*blocks[:position], merged, *blocks[position + 1 + m :]]
