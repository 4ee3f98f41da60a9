"""Joint Layer Drop and its parts: leave out attentions, MLPs or blocks that change the hidden states least.

Paper: He, Sun, Shen, Li, "What Matters in Transformers? Not All Attention is Needed", TMLR, arXiv 2406.15786. The
importance of a sub-layer is S = 1 − E[cos(X, Y)] with Y = X + Attention(Norm(X)) or X + MLP(Norm(X)): norm, sub-layer
and residual are taken as one. Block Drop, Attention Drop and MLP Drop leave out those of lowest S of their kind; Joint
Layer Drop ranks attentions and MLPs together. All are chosen at once from one measurement.

Where this differs: as many go as the budget asks for, so the model lands at the nearest size below it; the norm before
a dropped sub-layer, a few thousand weights, stays in the checkpoint. What leaves the attention is measured as what the
block gives without its MLP, so families whose attention and MLP run side by side are covered too.
"""

from dataclasses import dataclass
from typing import ClassVar

from layershare.methods.shortgpt import DropParts
from layershare.model.arch import Part


@dataclass(frozen=True)
class JointDrop(DropParts):
    """Leave out the attentions and MLPs that change the hidden states least, ranked together."""

    sizes: ClassVar[str] = "steps of an attention or MLP"
    parts: ClassVar[tuple[Part, ...]] = ("attention", "mlp")


@dataclass(frozen=True)
class AttentionDrop(DropParts):
    """Leave out the attentions that change the hidden states least."""

    sizes: ClassVar[str] = "steps of an attention"
    parts: ClassVar[tuple[Part, ...]] = ("attention",)


@dataclass(frozen=True)
class MlpDrop(DropParts):
    """Leave out the MLPs that change the hidden states least."""

    sizes: ClassVar[str] = "steps of an MLP"
    parts: ClassVar[tuple[Part, ...]] = ("mlp",)


@dataclass(frozen=True)
class BlockDrop(DropParts):
    """Leave out the blocks that change the hidden states least."""

    parts: ClassVar[tuple[Part, ...]] = ("block",)
