"""ShortGPT: leave out the blocks that change the hidden states least.

Paper: Men, Xu, Zhang, Wang, Lin, Lu, Han, Chen, "ShortGPT: Layers in Large Language Models are More Redundant Than You
Expect", arXiv 2403.03853. Block influence BIᵢ = 1 − E[XᵢᵀXᵢ₊₁ / (‖Xᵢ‖‖Xᵢ₊₁‖)] over all tokens, Xᵢ what enters block
i; the blocks of lowest BI go, all chosen at once from one measurement.

Where this differs: the paper fixes how many blocks go; here as many go as the budget asks for, so the model lands at
the nearest size below it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from layershare.calibrate.stats import Statistic
from layershare.errors import LayershareError
from layershare.model.arch import Part, Spec
from layershare.plan.budget import Budget, allows
from layershare.plan.edits import Drop, kept_layers
from layershare.plan.evidence import Evidence
from layershare.plan.method import Method

TOO_SMALL = "Leaving out layers alone cannot make this model so small; keep more."


@dataclass(frozen=True)
class DropParts(Method):
    """Leave out what changes the hidden states least, until the budget is met."""

    sizes: ClassVar[str] = "steps of a block"
    parts: ClassVar[tuple[Part, ...]]
    """What may be left out."""

    @property
    def uses(self) -> frozenset[Statistic]:
        """What blocks change of the hidden states."""
        return frozenset({"blocks"})

    @property
    def adaptive(self) -> bool:
        """It plans by what it measures."""
        return True

    def require(self, spec: Spec, budget: Budget) -> None:
        """Raise `LayershareError` if the budget is not met with all parts gone, or all blocks but the smallest."""
        sizes = [sum(x.parameters for x in spec.linears if x.layer == layer) for layer in range(spec.n_layers)]
        stays = sizes.index(min(sizes)) if "block" in self.parts else None
        layers = tuple(layer for layer in range(spec.n_layers) if layer != stays)
        if not allows(budget, spec, [Drop(part, layers) for part in self.parts if layers]):
            raise LayershareError(TOO_SMALL)

    def plan(self, spec: Spec, budget: Budget, evidence: Evidence) -> tuple[Drop, ...]:
        """The parts of lowest influence 1 − cos(X, Y), X being what enters and Y what leaves them."""
        influence: dict[tuple[int, Part], float] = {
            (layer, part): 1 - evidence.stats.cosines(layer)[part]
            for layer in range(spec.n_layers)
            for part in self.parts
            if part == "block" or spec.part(layer, part)
        }
        return drop_in_order(spec, budget, sorted(influence, key=lambda place: (influence[place], place)))


@dataclass(frozen=True)
class ShortGpt(DropParts):
    """ShortGPT has no options."""

    parts: ClassVar[tuple[Part, ...]] = ("block",)


def drop_in_order(spec: Spec, budget: Budget, order: Iterable[tuple[int, Part]]) -> tuple[Drop, ...]:
    """Drop the (layer, part) pairs in this order until the budget is met, as one edit per kind of part.

    Raises `LayershareError` if it cannot be met.
    """
    gone: dict[Part, list[int]] = {}
    for layer, part in order:
        if allows(budget, spec, _edits(gone)):
            break
        gone.setdefault(part, []).append(layer)
    edits = _edits(gone)
    if not kept_layers(spec.n_layers, edits) or not allows(budget, spec, edits):
        raise LayershareError(TOO_SMALL)
    return edits


def _edits(gone: dict[Part, list[int]]) -> tuple[Drop, ...]:
    return tuple(Drop(part, tuple(sorted(layers))) for part, layers in sorted(gone.items()))
