"""What a run will need of the machine, known before a weight is read."""

from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from typing import Any

from layershare.calibrate.stats import Statistic
from layershare.model.arch import Spec
from layershare.model.composition import Composition
from layershare.plan.budget import measure
from layershare.plan.edits import Share, places, sliced_width
from layershare.plan.layout import compositions
from layershare.plan.plan import Plan
from layershare.plan.work import Work, count_work

GRAM_ITEMSIZE = 4
"""Grams are float32."""
SLACK = 1.2
"""For what libraries keep and work with."""
AT_WORK = 50_000_000
"""Bytes that Python and torch take when they first work, of a model of any size (`benchmarks/cost`)."""


@dataclass(frozen=True)
class Needs:
    """Bytes: `memory` beside the interpreter and its libraries, and disk for `stats` and for the `output`; the `work`.

    `states`: the hidden states, which are a part of the output while the run lasts.
    """

    memory: int
    stats: int
    output: int
    states: int
    work: Work


def estimate_needs(
    spec: Spec,
    plan: Plan | None,
    *,
    blocks: int,
    length: int,
    batch_size: int,
    kinds: Collection[Statistic],
    streams: int = 0,
    epochs: int = 0,
    distills: int = 0,
    searches: bool = False,
    runs: int = 0,
    held_out: int = 0,
    rivals: int = 0,
    quantizes: bool = False,
    bits: int = 0,
) -> Needs:
    """Estimate the needs of a run that measures `kinds` on `blocks` × `length` tokens, `batch_size` at a time.

    It refits to so many `streams` of text, refines in so many `epochs` and distills so many tokens (0: not at all) and,
    if the method searches, runs the model on so many blocks then. It compares its plan with those of so many `rivals`
    on `held_out` blocks. It may store matrices as integers at the end (`quantizes`), after it has planned which, of so
    many `bits`.

    Memory is the largest of calibration and refit (a block, its Grams, a batch), of solving the largest group or delta
    in float64 (`benchmarks/memory` measures both), of the whole model with the activations of one block of text, which
    gradients need, of twice the model for methods that search (the model and what they try in its place), and of
    refining a block: it and the original's, its factors four times over in float32, and the activations of a batch; and
    of distilling: both models, gradients, AdamW's two moments, and the activations of a batch in all blocks.
    Without a plan yet, every target is taken to be solved for itself, at full size.
    """
    stack = f"{spec.base_prefix}{spec.blocks}."
    block = [0] * spec.n_layers
    for name, (shape, dtype) in spec.tensors.items():
        if name.startswith(stack):
            block[int(name[len(stack) :].partition(".")[0])] += prod(shape) * dtype.itemsize
    grams, outer = [0] * spec.n_layers, [0] * spec.n_layers
    for site in {linear.site: linear for linear in spec.linears}.values():
        grams[site.layer] += site.d_in**2 * GRAM_ITEMSIZE
    for linear in spec.linears:
        outer[linear.layer] += linear.d_out**2 * GRAM_ITEMSIZE
    width = max(linear.d_in for linear in spec.linears if linear.role in ("q", "qkv"))
    widest = max(max(linear.d_in, linear.d_out) for linear in spec.linears)
    itemsize = spec.tensors[spec.weight_name(spec.linears[0])][1].itemsize
    batch = batch_size * length * (4 * width + 3 * widest) * itemsize
    entering = blocks * length * width * itemsize
    states = 2 * entering
    text: Any = {"blocks": blocks, "length": length, "held_out": held_out}
    work = count_work(
        spec,
        plan,
        kinds=kinds,
        streams=streams,
        epochs=epochs,
        distills=distills,
        runs=runs,
        rivals=rivals,
        quantizes=quantizes,
        bits=bits,
        **text,
    )
    if plan is not None and (sliced := sliced_width(plan.edits)):
        return Needs(
            memory=2 * max(block) + batch + _eigenproblem(width) + AT_WORK,
            stats=0,
            output=2 * plan.after.all.bytes + states + 2 * spec.n_layers * width * sliced * GRAM_ITEMSIZE,
            states=states,
            work=work,
        )
    if plan is None:
        full = [Share(places(x.role, [x.layer]), min(x.d_in, x.d_out), "input") for x in spec.linears]
        composed, after = compositions(spec, full), measure(spec, ())
    else:
        composed, after = compositions(spec, plan.edits), plan.after
    steps = [_solving(each) for each in composed]
    passes = streams or not {"inputs", "blocks", "gradients"}.isdisjoint(kinds)
    if passes:
        steps.append(max(block) + (max(grams) if streams or "inputs" in kinds else 0) + batch)
    if streams == 2:  # both blocks, and two moments each of the blocks to fit on and of those that are held out
        steps.append(2 * max(block) + 4 * max(grams) + 2 * batch)
        states *= 2
    if epochs:
        dense = max(sum(x.parameters for x in spec.linears if x.layer == layer) for layer in range(spec.n_layers))
        steps.append(2 * max(block) + 4 * 4 * dense + 4 * batch)
        states *= 2
    model, activations = measure(spec, ()).all.bytes, batch // batch_size
    if quantizes:  # the whole of what is in floats, in float32, and a block's inputs
        steps.append(4 * after.all.parameters + 4 * max(grams) + batch)
    logits = 3 * length * spec.head_multiplications // width * 4  # as they are, in float32, and their gradient
    if held_out:  # two models' logits of one block of text, and their log-probabilities
        steps.append(max(block) + batch + held_out * length * width * itemsize + 2 * logits)
    if "gradients" in kinds:
        # What the way back needs of a block: all that it has computed, and gradients of the same size.
        steps.append(max(block) + max(outer) + 3 * batch + batch_size * logits)
        states += (spec.n_layers + 2) * entering
    moments = 8 * after.targets.parameters if distills else 0
    if distills:
        widths = sum(linear.d_in + linear.d_out for linear in spec.linears) + 4 * spec.n_layers * width
        passing = batch_size * length * 4 * widths + 2 * batch_size * logits
        steps.append(4 * after.all.parameters + model + 3 * moments // 2 + passing)
    if "fisher" in kinds:
        steps.append(model + spec.n_layers * activations + logits)
    if searches:
        steps.append(2 * model + activations + logits)
    states = states if passes or epochs else 0
    pooled = spec.n_layers * blocks * width * GRAM_ITEMSIZE
    return Needs(
        memory=int(SLACK * max(steps, default=0)) + AT_WORK,
        stats=sum(
            size
            for kind, size in (("inputs", sum(grams)), ("gradients", sum(outer)), ("blocks", pooled))
            if kind in kinds
        ),
        # Of the rivals, one at a time; what is quantized or distilled is there in floats before; three checkpoints.
        output=(2 + (rivals > 0)) * after.all.bytes + (quantizes or distills > 0) * model + states + 9 * moments // 2,
        states=states,
        work=work,
    )


def _solving(composition: Composition) -> int:
    """Float64 matrices while a composition is solved: the eigenproblem and its work space, weights, the factors.

    Beside a whole weight, which is among the factors, these are its target's weight and the difference of the two; for
    private directions, what is left of every weight without the shared ones, and without those.
    """
    products = [term for term in composition.terms if len(term.factors) > 1]
    if not products:  # a matrix on its own, stored as integers
        return 0
    first, product = composition.members[0], products[0]
    ends = [(product.factors[0], first.d_in), (product.factors[-1], first.d_out)]
    if composition.whole:
        width, weights = first.d_in, 2
    else:
        shared = [width for factor, width in ends if factor.home]
        width = shared[0] if len(composition.members) > 1 else min(first.d_in, first.d_out)
        weights = 1 if len(composition.terms) == 1 else 2 * len(composition.members)
    dense = sum((factor.outward or factor.inward or 0) ** 2 for factor in composition.factors if factor.pivots)
    largest = max(member.d_in * member.d_out for member in composition.members)
    return _eigenproblem(width) + 8 * (weights * largest + composition.parameters + dense)


def _eigenproblem(width: int) -> int:
    """A float64 eigenproblem and its work space."""
    return 8 * 5 * width**2
