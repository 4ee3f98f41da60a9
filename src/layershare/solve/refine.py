"""Refine a compressed model block by block: each block's own factors are trained to give what the original block gives.

As AA-SVD (arXiv 2604.02119) does it: min ‖block_t(X) − block′_t(X′)‖² with AdamW, X the hidden states of the original
model and X′ those that the blocks before this one, compressed and refined, really produce. What several blocks share, a
basis or an anchor's weight, stays as it is: blocks that were refined before depend on it. (AA-SVD shares nothing.)

Where this differs from AA-SVD: a step is a part of each tensor's root mean square, since one length for all wrecks a
good closed form; and the best state is chosen on text that is held out, not on the text that is trained on. Weighing
the block's error by the Gram of the loss's gradients made the sample model worse, so it is not done.
"""

from collections.abc import Callable
from dataclasses import replace
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from layershare.calibrate.drivers.batches import Part
from layershare.calibrate.drivers.calls import hidden_output
from layershare.calibrate.stream import Stream
from layershare.errors import LayershareError
from layershare.formulas.linalg import root_mean_square
from layershare.model.arch import Spec
from layershare.model.modes import evaluating
from layershare.model.norms import norm_parameters
from layershare.plan.edits import Edit, sharing
from layershare.plan.evidence import Evidence
from layershare.plan.layout import compositions
from layershare.recipe import Refine
from layershare.solve.apply import Factored, compressed
from layershare.store import Store

_EPS = 1e-12
"""Of AdamW: gradients of a relative error are far smaller than those of a loss."""


def require_factors(edits: tuple[Edit, ...]) -> None:
    """Raise `LayershareError` if nothing in a plan has factors."""
    if not sharing(edits):
        raise LayershareError("The plan shares no weights, so there are no factors to train; set effort=closed.")


@torch.no_grad()
def refine_blocks(
    factored: Factored, store: Store, evidence: Evidence, options: Refine, seed: int
) -> dict[str, dict[str, Any]]:
    """Refine every block that is not in `store` yet, in order; from then on `factored` has its tensors.

    The calibration text and the held-out one pass through the original and through the compressed blocks. A step takes
    `options.batch_size` rows of the first. The factors are trained in float32, rounded to the dtype that they are
    stored in whenever the block runs, and kept as they were after the epoch whose error on the held-out text is least,
    where epoch 0 is the unrefined block. Returns layer -> the relative error ‖block(X) − block′(X′)‖² / ‖block(X)‖² on
    the held-out text at the `start` and at the end (`error`), and the `epoch` that was kept.
    """
    spec = factored.spec
    require_factors(factored.plan.edits)
    evidence = replace(evidence, batch_size=gcd(options.batch_size, evidence.batch_size))
    targets, inputs = (evidence.stream(evidence.text, evidence.held_out) for _ in range(2))
    facts = {}
    for (layer, block), (_, same) in zip(targets, inputs, strict=True):
        names = own_factors(spec, factored.plan.edits, layer)
        if names and options.norms:
            names += norm_parameters(block)
        unit = f"layer-{layer:03d}"

        def step(epoch: int, layer: int = layer) -> None:
            evidence.progress(layer * options.epochs + epoch, spec.n_layers * options.epochs)

        step(0)
        targets.run()
        factored.take(store, unit)
        with compressed(same, layer, factored, own=names):
            if names and unit not in store:
                generator = torch.Generator().manual_seed(seed + layer)
                place = factored.weights.block_name(layer)
                parts = inputs.batches.split(len(evidence.text.tokens))
                best, found = _fit(same, names, targets, inputs, parts, options, generator, step)
                store.write(unit, {f"{place}.{name}": tensor for name, tensor in best.items()}, found)
                factored.take(store, unit)
            inputs.run()
        if names:
            facts[str(layer)] = store.facts(unit)
    evidence.progress(1, 1)
    return facts


def own_factors(spec: Spec, edits: tuple[Edit, ...], layer: int) -> list[str]:
    """Names, relative to a block, of the factors that no other block uses."""
    start, found = f"{spec.block(layer)}.", []
    for composition in compositions(spec, edits):
        for member, factor in composition.stored():
            users = composition.users(factor) if factor.home else (member,)
            if all(user.name.startswith(start) for user in users):
                found.append(f"{spec.within(layer, member.name)}.{factor.name}.weight")
    return found


def _fit(
    block: nn.Module,
    names: list[str],
    targets: Stream,
    inputs: Stream,
    parts: tuple[list[Part], list[Part]],
    options: Refine,
    generator: torch.Generator,
    step: Callable[[int], None],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the named parameters of the compressed block and leave them at their best; returns them, and facts.

    `parts`: the parts of batches to train on, and those that are held out.
    """
    parameters = {name: block.get_parameter(name) for name in names}
    wide = {name: parameter.detach().float().clone().requires_grad_() for name, parameter in parameters.items()}
    train, held_out = parts

    def norm(parts: list[Part]) -> float:
        return sum(float(_goal(targets, part).square().sum()) for part in parts)

    def error(part: Part, norm: float) -> Tensor:
        """The part's share of the relative error, ‖block(X)‖² being `norm`."""
        batch, rows = part
        args, kwargs = inputs.call(batch)
        rounded = {name: tensor.to(parameters[name].dtype) for name, tensor in wide.items()}
        output = hidden_output(functional_call(block, rounded, args, kwargs))[rows].float()
        return (output - _goal(targets, part).to(output.device)).square().sum() / norm

    def whole_error() -> float:
        return sum(float(error(part, spare)) for part in held_out)

    def snapshot() -> dict[str, Tensor]:
        return {name: tensor.detach().to(parameters[name].dtype, copy=True) for name, tensor in wide.items()}

    whole, spare = norm(train), norm(held_out)
    together = options.batch_size // inputs.batches.size
    groups = [{"params": [each], "lr": options.lr * root_mean_square(each)} for each in wide.values()]
    optimizer = torch.optim.AdamW(groups, eps=_EPS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * -(-len(train) // together))
    with evaluating(block):
        start = least = whole_error()
        best, kept = snapshot(), 0
        for epoch in range(1, options.epochs + 1):
            step(epoch - 1)
            for chosen in torch.randperm(len(train), generator=generator).split(together):
                optimizer.zero_grad()
                for number in chosen.tolist():
                    with torch.enable_grad():
                        loss = error(train[number], whole) * (len(train) / len(chosen))
                        # A norm before a dropped sub-layer is used for nothing.
                        gradients = torch.autograd.grad(loss, tuple(wide.values()), materialize_grads=True)
                    for tensor, gradient in zip(wide.values(), gradients, strict=True):
                        tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
                optimizer.step()
                schedule.step()
            if (now := whole_error()) < least:
                best, least, kept = snapshot(), now, epoch
    for name, parameter in parameters.items():
        parameter.copy_(best[name])
    return best, {"start": start, "error": least, "epoch": kept}


def _goal(targets: Stream, part: Part) -> Tensor:
    """What the original block gives for a part of a batch, in float32."""
    batch, rows = part
    return targets.batches.rows(targets.outputs, batch)[rows].float()
