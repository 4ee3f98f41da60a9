"""DeltaLLM: blocks that reuse another block's weights, each with a low-rank delta of its own.

Paper: Mikaelyan, Imani, Salvaris, Pathak, Fayyaz, "DeltaLLM: Compress LLMs with Low-Rank Deltas between Shared
Weights", arXiv 2501.18596. W_{l+i} = W_l + δ_{l→l+i} with δ of low rank: the weights of an anchor block l are stored
once, those of the blocks l+i as their deltas alone. The first two and last two blocks stay intact; MLPs lose less than
attentions; anchors and delta blocks alternate, or several delta blocks follow an anchor ("sequential"). The deltas come
from an SVD of the difference and are then trained, with the original as teacher. It is the training that makes the
model good: weights of neighbouring blocks have next to nothing in common, so deltas in closed form, which is all that
there is here, are where training starts.

The paper's settings are not known here in full, and there is no code of it, so this is DeltaLLM in outline. Ours are

- the SVD under the Gram G = XᵀX of the target's inputs: of all AB of rank r the one that minimises
  ‖X(W_t − W_a − AB)‖². (`weighted=false`: ‖W_t − W_a − AB‖², as the paper's words are most easily read.)
- that the target is first brought near to the anchor by changes that do not change what it computes (`align`): the
  norms' scales go into the matrices that read them; the neurons of an MLP are permuted so that those of like
  pre-activations meet, and so are heads, query heads within the group of their key head and groups as a whole. Norms
  are folded in plain pre-norm decoders alone (x + attention(norm(x)), then x + mlp(norm(x))); heads are permuted where
  q, k, v and o are matrices of their own. The paper is reported to do none of this.
- the order in which blocks become targets: the deepest first, since the paper calls later blocks the more redundant.
- the layout `measured`: the pairs of anchor and target, at most `span` blocks apart, that differ least after alignment,
  by the mean of Σ_{j>r}σⱼ² / ‖XW_t‖² over their matrices, σ the singular values of X(W_t − W_a).
- `mean`: the anchor is (ΣGᵢ)⁻¹ΣGᵢWᵢ over the anchor's block and its targets, and the anchor's block has a delta, too.
- the rank, which follows from `keep`: as few targets as can meet it with a rank of at least 1/32 of the width (the
  published 90 MB of deltas of DeltaPhi are about rank 100 at a width of 3072), then the largest rank that the budget
  allows, the same for all matrices; single ranks are added where more than 0.5 % of the budget is left.
- `init=random`, to compare with: A random and B = 0, as LoRA starts.

Multiplications per token and the cache of keys and values do not become fewer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from layershare.calibrate.stats import Statistic
from layershare.errors import LayershareError
from layershare.formulas.linalg import energy, spectrum
from layershare.methods.delta.aligned import Rewritten, aligned, as_it_is, folded
from layershare.methods.delta.solving import delta_units, solve_deltas
from layershare.methods.svd import Svd
from layershare.methods.svd_llm import SvdLlm
from layershare.model.arch import PARTS, Part, Spec, part_of
from layershare.plan.budget import Budget, allows, measure
from layershare.plan.edits import Delta, Edit, Share
from layershare.plan.evidence import Evidence
from layershare.plan.method import Method, Solution, Unit
from layershare.plan.ranks import TOLERANCE, Cost, spend
from layershare.values import MOST, Count, Flag, Whole

FLOOR = 32
"""The rank is at least the width divided by this."""
Pair = tuple[int, int]
"""The anchor block and the target block."""


@dataclass(frozen=True)
class DeltaLlm(Method):
    """Options of DeltaLLM."""

    solves: ClassVar[tuple[type, ...]] = (Delta, Share)
    wants_training: ClassVar[bool] = True
    sizes: ClassVar[str] = "down to what `unit`, `layout` and `protect` leave"
    unit: Literal["mlp", "attention", "both"] = "mlp"
    """What is shared."""
    layout: Literal["alternating", "sequential", "measured"] = "alternating"
    """One target per anchor, `span` of them, or pairs at most `span` apart that are chosen by measurement."""
    span: Count = 2
    """How far targets are from their anchors, in blocks."""
    protect: Annotated[Whole, Field(ge=0, le=MOST)] = 2
    """Blocks at either end that stay intact."""
    align: Flag = True
    """Bring targets near to their anchors first."""
    weighted: Flag = True
    """By the error on the target's inputs, not by that of the weights."""
    init: Literal["svd", "random"] = "svd"
    """Deltas from an SVD, or the anchor's weights alone."""
    mean: Flag = False
    """Share the mean of anchor and targets, with a delta for the anchor, too."""

    @property
    def uses(self) -> frozenset[Statistic]:
        """Grams, if errors are weighted by them."""
        return frozenset({"inputs"}) if self.weighted else frozenset()

    @property
    def starts_at_zero(self) -> bool:
        """All deltas are, where they are not fitted."""
        return self.init == "random"

    @property
    def adaptive(self) -> bool:
        """Whether anchors are chosen by measurement."""
        return self.layout == "measured"

    @property
    def parts(self) -> tuple[Part, ...]:
        """The sub-layers that are shared."""
        return PARTS if self.unit == "both" else (self.unit,)

    def require(self, spec: Spec, budget: Budget) -> None:
        """Raise `LayershareError` if there are no blocks to share, or if the layout cannot meet the budget.

        Of a measured layout it is known that an anchor has at most `span` targets on either side of it.
        """
        blocks = self._candidates(spec)
        if self.layout != "measured":
            self.plan(spec, budget, Evidence(spec))
        elif not self._near(spec):
            raise self._nothing(spec)
        elif all(self._alike(spec, blocks[0], block) for block in blocks):
            self._fewest(spec, budget, self._in_order(spec, 2 * self.span))

    def plan(self, spec: Spec, budget: Budget, evidence: Evidence) -> tuple[Delta, ...]:
        """As few targets as the budget needs, in the layout's order, at the largest rank that it allows."""
        if allows(budget, spec, ()):
            return ()
        if self.layout == "measured":
            pairs = self._measured(evidence)
        else:
            pairs = self._in_order(spec, 1 if self.layout == "alternating" else self.span)
        return _with_ranks(spec, self._fewest(spec, budget, pairs), budget)

    def _fewest(self, spec: Spec, budget: Budget, pairs: Sequence[Pair]) -> tuple[Delta, ...]:
        """The edits of the first pairs that meet the budget at the smallest rank.

        Raises `LayershareError` if all of them together do not.
        """
        if not pairs:
            raise self._nothing(spec)
        edits: tuple[Delta, ...] = ()
        for count in range(1, len(pairs) + 1):
            edits = self._edits(spec, pairs[:count])
            if allows(budget, spec, edits):
                return edits
        if budget.of == "multiplications":
            raise LayershareError("Deltas are multiplied beside a whole weight: they never save multiplications.")
        least, whole = (measure(spec, each).counted(budget.of) for each in (edits, ()))
        raise LayershareError(
            f"Deltas with these options leave at least {least / whole:.1%} of "
            f"{'the targets' if budget.of == 'targets' else 'the model'} ({least:,} parameters); keep more, set "
            "unit=both, set layout=sequential and a longer span, or protect fewer blocks."
        )

    def units(self, spec: Spec, edits: tuple[Edit, ...]) -> tuple[Unit, ...]:
        """Sub-layers with their anchors, after the low-rank factors that a plan by hand may have."""
        return (*super().units(spec, edits), *delta_units(spec, edits))

    def solve(self, unit: Unit, evidence: Evidence) -> Solution:
        """The deltas of a sub-layer, or the factors of a group."""
        deltas = [edit for edit in unit.edits if isinstance(edit, Delta)]
        if not deltas:
            return (SvdLlm() if self.weighted else Svd()).solve(unit, evidence)
        part, anchor = part_of(deltas[0].role), deltas[0].anchor
        targets = [layer for layer in deltas[0].layers if layer != anchor]
        # In a plan by hand, weights that stay as they are would not fit to a norm or units that are changed.
        whole = {delta.role for delta in deltas} == {linear.role for linear in evidence.spec.part(anchor, part)}
        views = replace(self, align=self.align and whole).views(evidence, part, anchor, targets)
        return solve_deltas(deltas, evidence.spec, dict(zip((anchor, *targets), views, strict=True)), self.init)

    def views(self, evidence: Evidence, part: Part, anchor: int, targets: Iterable[int]) -> list[Rewritten]:
        """A sub-layer of the anchor's block, then those of the targets', aligned to it if they are to be."""
        shown = [as_it_is(evidence, layer, part, weighted=self.weighted) for layer in (anchor, *targets)]
        if not self.align:
            return shown
        first, *others = map(folded, shown)
        return [first, *(aligned(first, other) for other in others)]

    def _candidates(self, spec: Spec) -> range:
        return range(self.protect, spec.n_layers - self.protect)

    def _in_order(self, spec: Spec, span: int) -> list[Pair]:
        """Groups of an anchor and the `span` blocks after it, from the last blocks to the first."""
        low, pairs = self.protect, []
        for end in range(self._candidates(spec).stop, low, -(span + 1)):
            anchor = max(end - span - 1, low)
            pairs += [(anchor, target) for target in range(anchor + 1, end) if self._alike(spec, anchor, target)]
        return pairs

    def _near(self, spec: Spec) -> list[Pair]:
        """All pairs at most `span` blocks apart."""
        blocks = self._candidates(spec)
        near = [(a, t) for a in blocks for t in blocks if a != t and abs(a - t) <= self.span]
        return [pair for pair in near if self._alike(spec, *pair)]

    def _measured(self, evidence: Evidence) -> list[Pair]:
        """Pairs of least residual first, leaving out what would make an anchor a target or give a target two."""
        near = self._near(evidence.spec)
        residuals = {}
        for done, pair in enumerate(near):
            evidence.progress(done, len(near))
            residuals[pair] = self._residual(evidence, pair)
        evidence.progress(len(near), len(near))
        chosen: list[Pair] = []
        for anchor, target in sorted(near, key=lambda pair: (residuals[pair], pair)):
            anchors, targets = ({pair[i] for pair in chosen} for i in (0, 1))
            if anchor not in targets and target not in anchors | targets:
                chosen.append((anchor, target))
        return chosen

    def _residual(self, evidence: Evidence, pair: Pair) -> float:
        """The mean over the pair's matrices of Σ_{j>r}σⱼ² / ‖XW_t‖² at the smallest rank."""
        anchor, target = pair
        residuals = []
        for part in self.parts:
            ours, theirs = self.views(evidence, part, anchor, [target])
            for role in ours.linears:
                gram, weight = theirs.gram(role), theirs.weight(role)
                values = spectrum([weight.double() - ours.weight(role)], [gram], "input")
                residuals.append(
                    float(values[floor_rank(evidence.spec, role, target) :].sum()) / (energy(weight, gram) or 1.0)
                )
        return sum(residuals) / len(residuals)

    def _alike(self, spec: Spec, anchor: int, target: int) -> bool:
        """Whether two blocks have the same matrices of the same shapes."""
        ours, theirs = (
            [{(x.role, x.d_in, x.d_out) for x in spec.part(layer, part)} for part in self.parts]
            for layer in (anchor, target)
        )
        return ours == theirs and all(ours)

    def _edits(self, spec: Spec, pairs: Sequence[Pair]) -> tuple[Delta, ...]:
        """The edits of smallest rank that make pairs of anchor and target, the first blocks first."""
        edits = []
        for anchor in sorted({anchor for anchor, _ in pairs}):
            targets = [target for each, target in pairs if each == anchor]
            layers = tuple(sorted([anchor, *targets] if self.mean else targets))
            for part in self.parts:
                roles = [linear.role for linear in spec.part(anchor, part)]
                edits += [Delta(role, anchor, layers, floor_rank(spec, role, anchor)) for role in roles]
        return tuple(edits)

    def _nothing(self, spec: Spec) -> LayershareError:
        return LayershareError(
            f"With protect={self.protect}, no two blocks that could share are left of this model's {spec.n_layers}; "
            "protect fewer."
        )


def floor_rank(spec: Spec, role: str, layer: int) -> int:
    """The smallest rank of a matrix's delta."""
    linear = spec.linear(role, layer)
    return min(ceil(spec.linear("down", layer).d_out / FLOOR), linear.d_in, linear.d_out)


def _with_ranks(spec: Spec, edits: Sequence[Delta], budget: Budget) -> tuple[Delta, ...]:
    """The edits with ranks raised as far as the budget allows, all by the same number, then some by one more."""
    linears = [spec.linear(edit.role, edit.anchor) for edit in edits]
    costs = [len(edit.layers) * (x.d_in + x.d_out) for edit, x in zip(edits, linears, strict=True)]
    left = budget.parameters - measure(spec, edits).targets.parameters
    more = left // sum(costs)
    ranks = [min(edit.rank + more, x.d_in, x.d_out) for edit, x in zip(edits, linears, strict=True)]
    left -= sum(cost * (rank - edit.rank) for cost, rank, edit in zip(costs, ranks, edits, strict=True))
    if left > TOLERANCE * budget.parameters:
        sizes = [cost * rank for cost, rank in zip(costs, ranks, strict=True)]
        limits = [Cost(cost, cost * min(x.d_in, x.d_out)) for cost, x in zip(costs, linears, strict=True)]
        spend(ranks, sizes, limits, left, range(len(edits)))
    return tuple(Delta(e.role, e.anchor, e.layers, rank) for e, rank in zip(edits, ranks, strict=True))
