"""What a method is: options, a plan, and a solution unit by unit."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from layershare.calibrate.stats import Statistic
from layershare.errors import LayershareError
from layershare.model.arch import Linear, Spec
from layershare.plan.budget import Budget
from layershare.plan.edits import Delta, Edit, Share, Slice
from layershare.plan.evidence import Evidence
from layershare.store import Store
from layershare.values import STRICT

_SOLVED = {Share: ("low-rank factors", "svd-llm"), Delta: ("deltas", "delta"), Slice: ("a slice", "slicegpt")}
"""The edits that need tensors which the model does not have: what they are, and a method that makes them."""


@dataclass(frozen=True)
class Unit:
    """What is solved, and stored, at once: edits whose tensors belong together.

    `name` is that of its file and tells it from units that were solved for other plans; `size` is its share of the
    work, in any unit.
    """

    name: str
    edits: tuple[Edit, ...]
    size: int = 1


@dataclass(frozen=True)
class Solution:
    """The tensors that a unit makes or changes, by full names in the checkpoint; what is known of each edit, by id."""

    tensors: dict[str, Tensor]
    facts: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Method(ABC):
    """A compression method: a frozen dataclass of its options, registered in `methods/__init__.py`."""

    __pydantic_config__ = STRICT
    solves: ClassVar[tuple[type, ...]] = ()
    """The kinds of edits that it has solutions for."""
    searches: ClassVar[bool] = False
    """Whether it runs the model on the text while it plans."""
    follows_original: ClassVar[bool] = False
    """Whether a refit aims at what the original puts out, and tries its choices on text that is held out."""
    wants_training: ClassVar[bool] = False
    """Whether what it leaves is a start for training rather than a result."""
    sizes: ClassVar[str] = "any"
    """The sizes that it can reach, in a few words."""

    @property
    def uses(self) -> frozenset[Statistic]:
        """The statistics that it plans and solves with; they are measured before."""
        return frozenset({"inputs"})

    @property
    def adaptive(self) -> bool:
        """Whether it plans by weights and statistics, so that there is no plan before these are there."""
        return False

    @property
    def offered_bits(self) -> tuple[int, ...]:
        """The bits that it plans with, if it plans how matrices are stored: `keep` counts bytes then."""
        return ()

    @property
    def starts_at_zero(self) -> bool:
        """Whether what it leaves to be trained is zero."""
        return False

    @property
    def reads_text(self) -> bool:
        """Whether it needs a text for its plan or its solution."""
        return bool(self.uses) or self.searches

    def runs(self, spec: Spec) -> int:
        """How often it runs the model on a block of text while it plans, roughly."""
        return 0

    def require(self, spec: Spec, budget: Budget) -> None:  # noqa: B027  # most methods treat every family
        """Raise `LayershareError` for what is known before anything is measured.

        That the method cannot treat this model, that its options do not fit it, or that nothing meets this budget.
        """

    def require_blocks(self, count: int) -> None:  # noqa: B027
        """Raise `LayershareError` if the method can do nothing with so few blocks of text."""

    @abstractmethod
    def plan(self, spec: Spec, budget: Budget, evidence: Evidence) -> tuple[Edit, ...]:
        """Choose the edits, never exceeding the budget; weights are among the evidence if the method is `adaptive`.

        Raises `LayershareError` if the budget cannot be met.
        """

    def predicted(self, edits: tuple[Edit, ...], evidence: Evidence) -> float | None:
        """By how much edits that it has planned raise the loss, in nats per token, if it can tell."""
        return None

    def rivals(self) -> "dict[str, Method]":
        """Methods by their names whose plans may turn out to be better than this one's.

        All are solved and measured on text that is held out, and the one that is nearest to the original is kept.
        """
        return {}

    def refits(self, fraction: float) -> bool:
        """Whether coefficients are fitted again to what the compressed layers put out, at this fraction of targets.

        That is what is done where the recipe leaves it to the method.
        """
        return False

    def outer_root(self, evidence: Evidence, linear: Linear) -> Tensor | None:
        """What errors in a linear's outputs count, as R with RᵀR the metric, d_out × d_out; `None`: all the same."""
        return None

    def units(self, spec: Spec, edits: tuple[Edit, ...]) -> tuple[Unit, ...]:
        """What a plan's edits are solved as, in order: every group for itself.

        Raises `LayershareError` for a plan, as it may have been written by hand, that the method has no solution for.
        """
        self.require_solvable(edits)
        units = []
        for share in (edit for edit in edits if isinstance(edit, Share)):
            private = f"+{share.private_rank}" if share.private_rank else ""
            name = f"{share.id}.{share.side}.{share.rank}{private}{'.pivoted' if share.pivot else ''}"
            units.append(Unit(name, (share,), sum(spec.linear(*place).parameters for place in share.places)))
        return tuple(units)

    def require_solvable(self, edits: tuple[Edit, ...]) -> None:
        """Raise `LayershareError` for edits that the method has no solution for."""
        for kind, (called, method) in _SOLVED.items():
            if kind not in self.solves and any(isinstance(edit, kind) for edit in edits):
                raise LayershareError(
                    f"The plan has {called}, which its method cannot make; set its method to one that can, such as "
                    f"'{method}'."
                )

    def solve(self, unit: Unit, evidence: Evidence) -> Solution:
        """The tensors of a unit. Raises `LayershareError` if one is not finite, naming the place."""
        raise NotImplementedError(f"{type(self).__name__} has units but no solution")

    def carry_out(self, edits: tuple[Edit, ...], solved: Store, evidence: Evidence) -> None:
        """Solve every unit that is not stored yet, and store each as soon as it is done. Raises as `solve` does."""
        units = self.units(evidence.spec, edits)
        total, done = sum(unit.size for unit in units), 0
        for unit in units:
            evidence.progress(done, total)
            if unit.name not in solved:
                solution = self.solve(unit, evidence)
                solved.write(unit.name, solution.tensors, solution.facts)
            done += unit.size
        if units:
            evidence.progress(total, total)
