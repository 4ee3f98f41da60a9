"""What a method is: options, a plan and a solution."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from layershare.calibrate.stats import Kind
from layershare.methods.evidence import Evidence, Inputs
from layershare.model.arch import Spec
from layershare.plan.budget import Budget
from layershare.plan.edits import Edit, Share
from layershare.solve.linalg import Factors, low_rank, share_and_own, share_input, share_output
from layershare.values import STRICT, Flag


@dataclass(frozen=True)
class Method(ABC):
    """A compression method: a frozen dataclass of its options, registered in `methods/__init__.py`."""

    __pydantic_config__ = STRICT
    uses: ClassVar[frozenset[Kind]] = frozenset({"inputs"})
    """The statistics that it plans and solves with; they are measured before."""
    adaptive: ClassVar[bool] = False
    """Whether it plans by weights and statistics, so that there is no plan before these are there."""
    searches: ClassVar[bool] = False
    """Whether it runs the model on the text while it plans."""
    wants_training: ClassVar[bool] = False
    """Whether what it leaves is a start for training rather than a result."""
    sizes: ClassVar[str] = "any"
    """The sizes that it can reach, in a few words."""

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
    def plan(self, spec: Spec, budget: Budget, evidence: Evidence | None) -> tuple[Edit, ...]:
        """Choose the edits, never exceeding the budget; `evidence` is there if the method is `adaptive`.

        Raises `LayershareError` if the budget cannot be met.
        """

    def solve(self, share: Share, weights: Sequence[Tensor], inputs: Sequence[Inputs | None]) -> Factors:
        """The factors of one group, `weights` n of d_in × d_out in layer order: the optimum under the Grams.

        A shared basis lies on the group's side; a group of one is plain low rank.
        """
        grams = [None if each is None else each.gram for each in inputs]
        return solve_group(share, weights, grams)

    def refits(self, fraction: float) -> bool:
        """Whether coefficients are fitted again to what the compressed layers put out, at this fraction of targets."""
        return False


_PIVOT = "Store the bases in pivoted form: k² parameters fewer each, so that ranks are higher at the same size."


@dataclass(frozen=True)
class LowRank(Method):
    """A method whose edits are `Share`s."""

    # Attribute docstrings of a base class are not found.
    pivot: Annotated[Flag, Field(description=_PIVOT)] = False


def solve_group(share: Share, weights: Sequence[Tensor], grams: Sequence[Tensor | None]) -> Factors:
    """The optimum for a group under its Grams (`None`: every input direction counts the same).

    With private directions beside, the best that alternating finds.
    """
    if share.private_rank:
        return share_and_own(weights, grams, share.rank, share.private_rank, share.side)
    if len(weights) > 1:
        solve = share_input if share.side == "input" else share_output
        return solve(weights, grams, share.rank)
    return as_factors(share, *low_rank(weights[0], grams[0], share.rank))


def as_factors(share: Share, left: Tensor, right: Tensor, error: float, spectrum: Tensor | None = None) -> Factors:
    """One matrix W ≈ left · right as basis and coefficients on the side of its group of one."""
    basis, coef = (left, right) if share.side == "input" else (right, left)
    return Factors(basis, (coef,), error, spectrum)
