"""SliceGPT: rotate the hidden states to their principal components and keep the largest.

Paper: Ashkboos, Croci, do Nascimento, Hoefler, Hensman, "SliceGPT: Compress Large Language Models by Deleting Rows and
Columns", ICLR 2024, arXiv 2401.15024. RMSNorm(XQ)Qᵀ = RMSNorm(X) for orthogonal Q, so with the norms' weights (and the
mean that LayerNorm subtracts) absorbed by the matrices beside them, the hidden states can be rotated by a Q_ℓ of each
sub-layer's own: W_embd Q₁, Q_ℓᵀW_in, W_out Q_{ℓ+1}, and Q_ℓᵀQ_{ℓ+1} on the residual. Q_ℓ are the eigenvectors of
C_ℓ = ΣXᵀX; of every matrix the rows and columns of the smallest eigenvalues are deleted. Signals are measured layer
after layer in the model that is rotated and sliced up to there.

Where this differs
- from paper, as the code: X is what enters a norm; the paper says what leaves it.
- from the code: the last hidden states and the head are sliced too, as the paper describes; the code leaves them whole
  by default. C_ℓ is summed in float32 and decomposed in float64 without dampening, which does not change eigenvectors.
  No token is left out. The code takes the embeddings' mean off in models with RMSNorm too, which changes what they
  compute; here only where LayerNorm subtracts it anyway.
- the shortcut is stored as Q_ℓᵀQ_{ℓ+1} − 1 and joins what the sub-layer writes, so that the block's own code, which
  adds x, stays as it is. In GPT-2 and OPT, dropout during training therefore falls on it as well.
- a residual multiplier m (Granite) divides the shortcut; multipliers of embeddings and logits do not matter.
- the width follows from `keep`, shortcuts and head counted; where the head was tied to the embedding, it is stored for
  itself from then on. There is no recovery fine-tuning here.
"""

from dataclasses import dataclass
from typing import ClassVar

from layershare.calibrate.stats import Statistic
from layershare.errors import LayershareError
from layershare.methods.slicegpt.slicing import slice_model, slice_units
from layershare.model.arch import Spec
from layershare.plan.budget import Budget, allows, measure
from layershare.plan.edits import Edit, Slice, sliced_width
from layershare.plan.evidence import Evidence
from layershare.plan.method import Method, Unit
from layershare.plan.ranks import TOLERANCE
from layershare.store import Store
from layershare.values import Count

ALIGNED = 8
"""Widths in multiples of this multiply fast on accelerators; the published code rounds to it."""


@dataclass(frozen=True)
class SliceGpt(Method):
    """Options of SliceGPT."""

    solves: ClassVar[tuple[type, ...]] = (Slice,)
    round_to: Count | None = None
    """The width is a multiple of it; without, of 8 if that uses the budget up to 0.5 %, otherwise of 1."""

    @property
    def uses(self) -> frozenset[Statistic]:
        """No statistics."""
        return frozenset()

    @property
    def reads_text(self) -> bool:
        """It does, while it slices."""
        return True

    def require(self, spec: Spec, budget: Budget) -> None:
        """Raise `UnsupportedModelError`, with the reason, for a model that is no plain pre-norm decoder."""
        spec.sliceable()

    def plan(self, spec: Spec, budget: Budget, evidence: Evidence) -> tuple[Slice, ...]:
        """The widest slice that the budget allows. Raises `LayershareError` if not even the narrowest fits."""
        if budget.fraction == 1:
            return ()
        if self.round_to is not None:
            return (_widest(spec, budget, self.round_to),)
        finest = _widest(spec, budget, 1)
        aligned = Slice(finest.width // ALIGNED * ALIGNED)
        if aligned.width:
            used, possible = (_used(spec, budget, edit) for edit in (aligned, finest))
            if used >= possible * (1 - TOLERANCE):
                return (aligned,)
        return (finest,)

    def units(self, spec: Spec, edits: tuple[Edit, ...]) -> tuple[Unit, ...]:
        """The embeddings, block after block, and the head."""
        self.require_solvable(edits)
        width = sliced_width(edits)
        return () if width is None else slice_units(spec, width)

    def carry_out(self, edits: tuple[Edit, ...], solved: Store, evidence: Evidence) -> None:
        """Slice block after block, each by what the blocks before it, already sliced, give."""
        if (width := sliced_width(edits)) is not None:
            slice_model(width, solved, evidence)


def _used(spec: Spec, budget: Budget, edit: Slice) -> int:
    """What the budget counts of the sliced model."""
    return measure(spec, (edit,)).counted(budget.of)


def _widest(spec: Spec, budget: Budget, step: int) -> Slice:
    """The widest slice, in multiples of `step`, that the budget allows; found by bisection."""
    low, high = 0, spec.sliceable().width // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if allows(budget, spec, (Slice(middle * step),)) else (low, middle - 1)
    if low == 0:
        raise LayershareError("Slicing alone cannot make this model so small; keep more, or set a smaller round_to.")
    return Slice(low * step)
