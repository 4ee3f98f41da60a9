"""Blocks as linear combinations of a model's own blocks: what merging one after the other comes to."""

from collections.abc import Iterable, Sequence

from layershare.errors import LayershareError
from layershare.model.arch import Spec
from layershare.plan.budget import Budget, allows
from layershare.plan.edits import Merge

Block = dict[int, float]
"""A block whose every tensor is Σ cⱼ Tⱼ over the model's layers j: layer -> coefficient."""


def combine(terms: Iterable[tuple[float, Block]]) -> Block:
    """Σ c·B of blocks that may be combinations themselves.

    >>> combine([(0.5, {1: 1.0}), (0.5, {2: 0.25, 3: 0.75})])
    {1: 0.5, 2: 0.125, 3: 0.375}
    """
    total: Block = {}
    for coefficient, block in terms:
        for layer, inner in block.items():
            total[layer] = total.get(layer, 0.0) + coefficient * inner
    return dict(sorted(total.items()))


def unmerged(n_layers: int) -> list[Block]:
    """A model's blocks before any is merged."""
    return [{layer: 1.0} for layer in range(n_layers)]


def merges(blocks: Sequence[Block]) -> tuple[Merge, ...]:
    """The edits that make these blocks, each in the place of its first layer; together they hold every layer once."""
    return tuple(Merge(min(b), tuple(b), tuple(b.values())) for b in blocks if len(b) > 1)


def require_mergeable(spec: Spec, budget: Budget, layers: Sequence[int]) -> None:
    """Raise `LayershareError` if the budget is not even met when all these layers are merged into one."""
    if not allows(budget, spec, merges([dict.fromkeys(layers, 1.0)])):
        raise LayershareError("Merging layers alone cannot make this model so small; keep more.")


def require_alike(spec: Spec) -> None:
    """Raise `LayershareError` if the model's blocks differ in names or shapes of their tensors."""
    shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in range(spec.n_layers)]
    for name, (shape, _) in spec.tensors.items():
        if (layer := spec.layer_of(name)) is not None:
            shapes[layer][spec.renumbered(name, 0)] = shape
    for layer, found in enumerate(shapes):
        if found != shapes[0]:
            raise LayershareError(
                f"Layer {layer} of this model has other shapes than layer 0, so layers cannot be merged; leave out "
                "layers with another method, such as shortgpt."
            )
