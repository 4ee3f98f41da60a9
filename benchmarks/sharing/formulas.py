"""What sharing a basis between matrices costs the loss, exactly: each matrix under its own metric, never a pooled one.

A matrix W (d_in × d_out) is looked at from the side whose basis is shared, of width d. On the input side its metric is
G, the Gram of its inputs, and N = WΓWᵀ with Γ the Gram of the gradients at its outputs; on the output side they are Γ
and N = WᵀGW. With RᵀR the metric, Z = RWΓ^½ (or RWᵀG^½) and M = ZZᵀ = RNRᵀ, all d × d, a basis B (d × k) leaves of the
two-sided error exactly tr M − tr QᵀMQ, Q an orthonormal basis of what RB spans. So a shared B is judged for every
member by that member's own R and M, and everything here is a problem of width d. All in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import torch
from torch import Tensor

from layershare.formulas.linalg import square_root

ROUNDS, STEPS = 3, 10
"""Of alternating, and of conjugate gradients in each round."""
PRICES = 600
"""Prices of a parameter that a frontier is made of."""


@dataclass(frozen=True)
class Seen:
    """A matrix seen from the side whose basis is shared: metric and N (d × d), and the width D of its other side."""

    metric: Tensor
    outer: Tensor
    other: int

    @property
    def width(self) -> int:
        """d."""
        return len(self.metric)

    @cached_property
    def root(self) -> Tensor:
        """R, upper triangular."""
        return square_root([self.metric])

    @cached_property
    def moment(self) -> Tensor:
        """M = RNRᵀ."""
        return self.root @ self.outer @ self.root.T

    @cached_property
    def axes(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues of M, falling, and its eigenvectors: the best directions for this matrix alone."""
        return falling(self.moment)

    @property
    def whole(self) -> int:
        """The parameters of the matrix."""
        return self.width * self.other


def falling(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first and none below zero, and eigenvectors of a symmetric matrix."""
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def tails(gains: Tensor) -> Tensor:
    """Rank, from 0 to all -> what is left of a sum when so many of its terms are taken."""
    return (gains.sum() - torch.cat([gains.new_zeros(1), gains.cumsum(0)])).clamp(min=0)


def own_losses(member: Seen) -> Tensor:
    """Rank -> the loss of a matrix with the best basis of its own."""
    return tails(member.axes[0])[: min(member.width, member.other) + 1]


def shared_losses(members: Sequence[Seen], basis: Tensor) -> Tensor:
    """Rank k -> the loss of all members with the first k columns of one basis (d × n)."""
    total = torch.zeros(basis.shape[1] + 1, dtype=torch.float64)
    for member in members:
        q = torch.linalg.qr(member.root @ basis).Q
        gains = (q * (member.moment @ q)).sum(0)
        total += (member.moment.trace() - torch.cat([gains.new_zeros(1), gains.cumsum(0)])).clamp(min=0)
    return total


def pooled(members: Sequence[Seen]) -> Tensor:
    """Basis Sharing's directions, best first (d × d): with SᵀS the sum of the metrics, S⁻¹U, U those of S(ΣN)Sᵀ."""
    root = square_root([member.metric for member in members])
    outer = torch.stack([member.outer for member in members]).sum(0)
    return torch.linalg.solve_triangular(root, falling(root @ outer @ root.T)[1], upper=True)


def common(members: Sequence[Seen], rank: int) -> Tensor:
    """Directions that are common to the members' own best subspaces of a rank, best first (d × d).

    Those b that maximise bᵀ(ΣRᵢᵀUᵢUᵢᵀRᵢ)b / bᵀ(ΣGᵢ)b, Uᵢ member i's own best directions.
    """
    root = square_root([member.metric for member in members])
    wanted = torch.zeros_like(root)
    for member in members:
        best = member.root.T @ member.axes[1][:, :rank]
        wanted += best @ best.T
    half = torch.linalg.solve_triangular(root, wanted, upper=True, left=False)
    values = torch.linalg.solve_triangular(root.T, half, upper=False)
    return torch.linalg.solve_triangular(root, falling(values)[1], upper=True)


def rests(members: Sequence[Seen], basis: Tensor) -> list[Tensor]:
    """Of each member, what a shared basis (d × k) leaves: private rank -> loss with the best private directions."""
    left = []
    for member in members:
        q = torch.linalg.qr(member.root @ basis).Q
        rest = _without(member.moment, q)
        values = torch.linalg.eigvalsh((rest + rest.T) / 2).flip(0).clamp(min=0)
        left.append(tails(values))
    return left


def polished(members: Sequence[Seen], basis: Tensor, private: Sequence[int] = ()) -> Tensor:
    """A better shared basis than one (d × k) by alternating; `private`: ranks that each member has beside.

    Coefficients and private directions have closed forms for a given B. With these fixed the loss
    Σ‖Zᵢ − Pᵢ − RᵢBCᵢ‖² is quadratic in B, ΣGᵢBCᵢCᵢᵀ = ΣRᵢᵀ(Zᵢ − Pᵢ)Cᵢᵀ, which conjugate gradients bring down.
    """
    mean = square_root([member.metric for member in members])
    for _ in range(ROUNDS):
        squares, target = [], torch.zeros_like(basis)
        for member, rank in zip_longest(members, private, fillvalue=0):
            assert isinstance(member, Seen)
            q, upper = torch.linalg.qr(member.root @ basis)
            kept = member.moment @ q
            inner = torch.linalg.solve_triangular(upper, q.T @ kept, upper=True)  # C Zᵀ Q
            squares.append(torch.linalg.solve_triangular(upper, inner.T, upper=True).T)  # C Cᵀ
            if rank:
                own = falling(_without(member.moment, q))[1][:, :rank]
                kept = kept - own @ (own.T @ (kept - q @ (q.T @ kept)))
            aim = torch.linalg.solve_triangular(upper, kept.T, upper=True).T  # (Z − P)Cᵀ
            target += member.root.T @ aim
        basis = _descended(members, squares, mean, target, basis)
    return basis


def _without(moment: Tensor, q: Tensor) -> Tensor:
    """(1 − QQᵀ)M(1 − QQᵀ)."""
    left = moment - q @ (q.T @ moment)
    return left - (left @ q) @ q.T


def _descended(
    members: Sequence[Seen], squares: Sequence[Tensor], mean: Tensor, target: Tensor, basis: Tensor
) -> Tensor:
    """Some steps of conjugate gradients on ΣGᵢBSᵢ = T for B, preconditioned with the sums of the Gᵢ and of the Sᵢ."""
    right = square_root(squares)

    def applied(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for member, square in zip(members, squares, strict=True):
            total += member.metric.double() @ x @ square
        return total

    def eased(x: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(mean.T, x, upper=False)
        left = torch.linalg.solve_triangular(mean, half, upper=True)
        half = torch.linalg.solve_triangular(right, left, upper=True, left=False)
        return torch.linalg.solve_triangular(right.T, half, upper=False, left=False)

    rest = target - applied(basis)
    eager = eased(rest)
    step, size = eager, float((rest * eager).sum())
    for _ in range(STEPS):
        if size <= 0:
            break
        image = applied(step)
        length = size / float((step * image).sum())
        basis, rest = basis + length * step, rest - length * image
        eager = eased(rest)
        size, before = float((rest * eager).sum()), size
        step = eager + size / before * step
    return basis


def frontier(curves: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes, rising, and the least losses at them, of several curves (sizes, losses) whose sum is to be split best.

    These are the points that some price of a parameter leads to; the third tensor has each curve's entry at them,
    points × curves.
    """
    losses = torch.cat([loss for _, loss in curves])
    low, high = float(losses[losses > 0].min()), float(losses.max())
    largest = max(float(size.max()) for size, _ in curves)
    ends = torch.tensor([low / largest / 1e3, high]).log10().tolist()
    prices = torch.logspace(ends[1], ends[0], PRICES, dtype=torch.float64)
    entries = torch.stack([(loss[None] + prices[:, None] * size[None]).argmin(1) for size, loss in curves], 1)
    sizes, losses = (torch.stack([each[i][entries[:, j]] for j, each in enumerate(curves)]).sum(0) for i in (0, 1))
    fresh = torch.cat([torch.ones(1, dtype=torch.bool), sizes.diff() > 0])
    return sizes[fresh], losses[fresh], entries[fresh]


def at(x: Tensor, y: Tensor, wanted: float) -> float:
    """y where x, which rises, is `wanted`, on straight lines between points and beyond none."""
    place = int(torch.searchsorted(x, wanted))
    if place == 0 or place == len(x):
        return float(y[min(place, len(y) - 1)])
    part = (wanted - float(x[place - 1])) / float(x[place] - x[place - 1])
    return float(y[place - 1]) + part * float(y[place] - y[place - 1])
