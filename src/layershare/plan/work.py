"""How long a run will take: its multiplications, counted, and the speed of this machine, measured in half a second."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from layershare.calibrate.stats import BACKWARD, Statistic
from layershare.formulas.quantize import Numbers, as_stored
from layershare.model.arch import Spec
from layershare.plan.edits import Delta, Share, places, sharing, sliced_width
from layershare.plan.plan import Plan
from layershare.plan.precision import probed_ranks

HANDLING = 1.4
"""For what a block does beside its products: norms, softmax, rounding, copies."""
START = 3.0
"""Seconds to open the model and the text, and to write the result."""
_ROWS = 1024
_WIDEST = 1024
_FEW = 64
_REFIT = {1: 2, 2: 5}
"""Passes of a refit, by its streams of text: with two, both blocks run up to every site, and through."""
_MEASURED = 11
"""How often held-out text is measured while a model is distilled."""
_SCALES = 500
"""Multiplications that finding the scales takes as long as, for each number."""
_ENOUGH = 0.08
"""Seconds that each kind of product is measured."""


@dataclass(frozen=True)
class Speed:
    """Multiplications per second: through a model in its dtype, of Grams in float32, in float64; `eigen`: d³ of them.

    `place`: where it was measured, in words. `column`: seconds that rounding a column takes beside its multiplications.
    """

    model: float
    single: float
    double: float
    eigen: float
    place: str
    column: float = 0.0


@dataclass(frozen=True)
class Work:
    """Multiplications of a run, by the kinds that `Speed` tells apart; `eigen` is Σd³ over the eigenproblems.

    `columns`: how many of matrices GPTQ rounds, one after the other.
    """

    model: int = 0
    single: int = 0
    double: int = 0
    eigen: int = 0
    columns: int = 0

    def seconds(self, speed: Speed) -> float:
        """How long that takes, roughly."""
        products = HANDLING * self.model / speed.model + self.single / speed.single + self.double / speed.double
        return START + products + self.eigen / speed.eigen + self.columns * speed.column


def count_work(
    spec: Spec,
    plan: Plan | None,
    *,
    blocks: int,
    length: int,
    kinds: Collection[Statistic],
    streams: int,
    epochs: int,
    runs: int,
    distills: int = 0,
    held_out: int = 0,
    rivals: int = 0,
    quantizes: bool = False,
    bits: int = 0,
) -> Work:
    """The work of a run, without evaluation, of which nothing is done yet.

    It takes `blocks` × `length` tokens through the model for its statistics (`kinds`), to refit to so many `streams`,
    to refine in so many `epochs`, and while it plans, `runs` × `length` tokens. It distills so many tokens. On
    `held_out` × `length` tokens, which refit and training take, too, it measures its plan, those of its `rivals`, which
    it solves for that, the refit and what is trained. It may store matrices as integers (`quantizes`), after it has
    planned which, of so many `bits`; what it compares is rounded to integers then, and a rival is little else.
    Without a plan, every matrix counts as solved at its full rank, if the method solves anything.
    """
    tokens = blocks * length
    sites = {linear.site: linear.d_in for linear in spec.linears}.values()
    attention = 2 * length * sum(linear.d_in for linear in spec.linears if linear.role == "o")
    forward = sum(linear.parameters for linear in spec.linears) + attention
    whole = forward + spec.head_multiplications
    grams = tokens * sum(d * d for d in sites)
    passes = single = head = 0
    if "inputs" in kinds or "blocks" in kinds:
        passes, single = 1, grams if "inputs" in kinds else 0
    if "gradients" in kinds:  # every block forwards once more, and backwards to its inputs, which is as much again
        passes = max(passes, 1) + BACKWARD
        head = BACKWARD * tokens * spec.head_multiplications
        single += tokens * sum(linear.d_out**2 for linear in spec.linears)
    if plan is not None and sliced_width(plan.edits):
        width = max(linear.d_in for linear in spec.linears if linear.role in ("q", "qkv"))
        turned = 2 * spec.n_layers * width**3 + width * sum(linear.parameters for linear in spec.linears)
        return Work(2 * tokens * forward, 2 * tokens * spec.n_layers * width**2, turned, 2 * spec.n_layers * width**3)
    compared = (
        (rivals + 2 + (epochs > 0) + (distills > 0)) * held_out * length * (forward + 2 * spec.head_multiplications)
    )
    if streams:
        passes += _REFIT[streams] * (blocks + held_out) / blocks
        single += streams * grams
    taught = 0
    if distills:  # the original forwards, the other one forwards and backwards; on held-out text both forwards
        taught = (4 * distills + 2 * _MEASURED * held_out * length) * whole
    if epochs:
        passes += 2 + 3 * epochs  # original, compressed; forward and backward, which is twice a forward
        passes += (3 + epochs) * held_out / blocks  # the same of the former, and every epoch's error
    model = (
        int(tokens * passes) * forward
        + head
        + compared
        + taught
        + runs * length * whole
        + (3 * tokens * whole if "fisher" in kinds else 0)
    )
    if plan is not None:
        edits = list(dict.fromkeys(sharing(plan.edits).values()))
    elif kinds == {"blocks"} or (runs and not kinds):
        edits = []
    else:
        edits = [Share(places(x.role, [x.layer]), min(x.d_in, x.d_out), "input") for x in spec.linears]
    double = eigen = 0
    if "gradients" in kinds:  # the roots of their Grams, and the spectra that are planned by, at a third of the price
        eigen = sum(linear.d_out**3 + min(linear.d_in, linear.d_out) ** 3 // 3 for linear in spec.linears)
    for edit in edits:
        shapes = [(linear.d_in, linear.d_out) for linear in (spec.linear(*place) for place in edit.places)]
        if isinstance(edit, Delta):
            shapes = shapes[-len(edit.layers) :]
            side, rounds = min(shapes[0]), len(shapes)
        else:
            side = shapes[0][edit.side == "output"] if len(shapes) > 1 else min(shapes[0])
            rounds = 1
        eigen += rounds * side**3
        double += rounds * side**3
        for d_in, d_out in shapes:
            double += max(d_in, d_out) * side * (side + edit.rank) + d_in**2 * d_out * bool(kinds)
            if streams:
                double += edit.rank * (d_in * (d_in + edit.rank + d_out) + edit.rank * d_out)
    columns, rounds = 0, 1
    if bits:  # all that is compared
        rounds += rivals + (streams == 2) + (epochs > 0) + (distills > 0)
    if quantizes:
        model += rounds * 3 * tokens * forward  # to where first and second factors read, and through
        single += rounds * 2 * grams
    for linear in spec.linears if quantizes else ():
        d_in, d_out = linear.d_in, linear.d_out
        times = rounds + (bits if plan is None else 0)
        columns += times * d_in
        double += times * _rounding(d_out, d_in)
        if plan is None:
            for rank in probed_ranks(linear):
                columns += d_in
                double += _rounding(rank, d_in - rank) + _rounding(d_out, rank)
                eigen += min(d_in, d_out) ** 3
    solved = 1 if bits else 1 + rivals
    return Work(model, single, solved * double, solved * eigen, columns)


def _rounding(rows: int, columns: int) -> int:
    """Multiplications of GPTQ: of the inverse, of the columns to come, and what finding the scales is worth."""
    return columns**3 + rows * columns * (columns // 2 + _SCALES)


@cache
def measure_speed(device: str, dtype: torch.dtype, width: int) -> Speed:
    """Measure the speed of products of matrices `width` wide, where that is not very wide, on a device."""
    width = min(width, _WIDEST)

    def matrix(rows: int, kind: torch.dtype) -> Tensor:
        return torch.randn(rows, width, device=device).to(kind)

    x, w = matrix(_ROWS, dtype), matrix(2 * width, dtype)
    single, double = matrix(256, torch.float32), matrix(width, torch.float64)
    symmetric = double @ double.T
    few, small = matrix(_FEW, torch.float32)[:, :_FEW], torch.eye(min(_FEW, width), device=device)
    place = f"{device}, {torch.get_num_threads()} threads" if device == "cpu" else device
    return Speed(
        model=_per_second(lambda: torch.nn.functional.silu(x @ w.T), _ROWS * 2 * width**2),
        single=_per_second(lambda: single.T @ single, 256 * width**2),
        double=_per_second(lambda: double @ double, width**3),
        eigen=_per_second(lambda: torch.linalg.eigh(symmetric), width**3),
        place=place.replace("1 threads", "1 thread"),
        column=1 / _per_second(lambda: as_stored(few, small, Numbers(4, _FEW), torch.float32), _FEW),
    )


def _per_second(product: Callable[[], object], multiplications: int) -> float:
    """Multiplications per second, after a first time that does not count."""

    def once() -> None:
        product()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    once()
    times, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < _ENOUGH:
        once()
        times += 1
    return times * multiplications / passed
