"""MKA: merge neighbouring layers whose activations lie on the same manifold.

Paper: Liu, Qin, Wang, Yang, Wang, Rong, Liu, Hao, Chen, Fan, Lv, Tu, Chu, Li, Sui, "Pruning via Merging: Compressing
LLMs via Manifold Alignment Based Layer Merging", EMNLP 2024, arXiv 2406.16330. Of every layer's activations H_l, one
vector per text, a diffusion map gives coordinates Ψ_l: the kernel exp(−(D/σ)^½) of the Euclidean distances D, divided
by the square roots of its densities (α = ½) and normalised, has Ψ_l as its leading two eigenvectors after the trivial
one. Layers are as similar as their normalised pairwise information bottleneck says,
S_lm = I(Ψ_l; Ψ_m) / √(H(Ψ_l)H(Ψ_m)). The two most similar neighbours are merged, θ̃ = S_lm θ_l + (1 − S_lm)θ_m, and so
on with the merged layers until the budget is met; of equally similar pairs the deeper goes first.

Where this differs
- from paper and code: I and H are counted, not estimated from distances between neighbours, which gives entropies that
  can be negative: each coordinate's ranks over the texts are cut into b = ⌊n^¼⌋ (at least 2) bins of equal size, and
  the b² cells of two coordinates are the values of Ψ. So 0 ≤ S ≤ 1, and S = 1 for equal manifolds. σ is the median
  distance in a layer and not 8, since hidden states grow with depth and differ between models. H_l is the hidden state
  of the last token that leaves a layer; merged layers keep that of their last one. As many layers are merged as the
  budget asks for, so the model lands at the nearest size below it.
- from the published code as others distribute it: that merges the two last layers each time, whatever their similarity,
  with weights from a sigmoid of average similarities; the paper's similar pairs and its α ≈ S_lm are taken here.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from layershare.calibrate.stats import Statistic
from layershare.errors import LayershareError
from layershare.methods.merging import combine, merges, require_alike, require_mergeable, unmerged
from layershare.model.arch import Spec
from layershare.plan.budget import Budget, allows
from layershare.plan.edits import Merge
from layershare.plan.evidence import Evidence
from layershare.plan.method import Method

COORDINATES = 2
"""Coordinates of the diffusion map."""
FEWEST = 16
"""Blocks of text below which nothing can be said about information: two bins per coordinate and layer."""


@dataclass(frozen=True)
class Mka(Method):
    """MKA has no options."""

    sizes: ClassVar[str] = "steps of a block"

    @property
    def uses(self) -> frozenset[Statistic]:
        """What blocks change of the hidden states."""
        return frozenset({"blocks"})

    @property
    def adaptive(self) -> bool:
        """It plans by what it measures."""
        return True

    def require(self, spec: Spec, budget: Budget) -> None:
        """Raise `LayershareError` if layers differ in shape, or if a single layer is still too large."""
        require_alike(spec)
        require_mergeable(spec, budget, range(spec.n_layers))

    def require_blocks(self, count: int) -> None:
        """Raise `LayershareError` if there are fewer than 16."""
        if count < FEWEST:
            raise LayershareError(f"mka compares layers on at least {FEWEST} blocks of text; give more blocks.")

    def plan(self, spec: Spec, budget: Budget, evidence: Evidence) -> tuple[Merge, ...]:
        """Merge the most similar neighbours until the budget is met."""
        states = [evidence.stats.pooled(layer) for layer in range(spec.n_layers)]
        self.require_blocks(len(states[0]))
        cells = [cells_of(diffusion_map(each)) for each in states]
        blocks = unmerged(spec.n_layers)
        while not allows(budget, spec, merges(blocks)):
            s = [similarity(cells[max(one)], cells[max(two)]) for one, two in pairwise(blocks)]
            i = max(range(len(s)), key=lambda i: (s[i], i))
            blocks[i : i + 2] = [combine([(s[i], blocks[i]), (1 - s[i], blocks[i + 1])])]
        return merges(blocks)


def diffusion_map(states: Tensor) -> Tensor:
    """Coordinates Ψ (n × 2) of n states (n × width): eigenvectors 1 and 2 of the diffusion kernel over eigenvector 0.

    Eigenvector 0 is known, √(row sums), so that nothing is divided by zero.
    """
    wide = states.double()
    distances = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist")
    scale = float(distances[~torch.eye(len(wide), dtype=torch.bool)].median()) or 1.0
    kernel = (-(distances / scale).sqrt()).exp()
    density = kernel.sum(0).sqrt()
    kernel = kernel / (density[:, None] * density)
    root = kernel.sum(0).sqrt()
    _, vectors = torch.linalg.eigh(kernel / (root[:, None] * root))
    return vectors[:, -1 - COORDINATES : -1].flip(1) / root[:, None]


def cells_of(coordinates: Tensor) -> Tensor:
    """The cell (n, numbered) of each point (n × coordinates) on a grid with b = ⌊n^¼⌋ equally filled bins a side."""
    n = len(coordinates)
    bins = max(2, int(n**0.25 + 1e-9))
    place = coordinates.argsort(stable=True, dim=0).argsort(dim=0) * bins // n
    return (place * bins ** torch.arange(coordinates.shape[1])).sum(1)


def similarity(one: Tensor, two: Tensor) -> float:
    """S = I(Ψ₁; Ψ₂) / √(H(Ψ₁)H(Ψ₂)) of two layers' cells (n each), between 0 and 1."""
    first, second = (one_hot(cells).double() for cells in (one, two))
    joint = first.T @ second / len(one)
    h1, h2, both = (_entropy(p) for p in (joint.sum(1), joint.sum(0), joint.flatten()))
    return min(max((h1 + h2 - both) / (h1 * h2) ** 0.5, 0.0), 1.0)


def _entropy(probabilities: Tensor) -> float:
    """H = −Σ p log p, in nats."""
    return -float(torch.special.xlogy(probabilities, probabilities).sum())
