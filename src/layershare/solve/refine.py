"""Refine a compressed model block by block: each block's own factors are trained to give what the original block gives.

As AA-SVD (arXiv 2604.02119) does it: min ‖block_t(X) − block′_t(X′)‖² with AdamW, X the hidden states of the original
model and X′ those that the blocks before this one, compressed and refined, really produce. What several blocks share, a
basis or an anchor's weight, stays as it is: blocks that were refined before depend on it. (AA-SVD shares nothing.)
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from layershare.calibrate.drivers.calls import hidden_output
from layershare.calibrate.stream import Stream
from layershare.errors import LayershareError
from layershare.model.arch import Spec
from layershare.model.modes import evaluating
from layershare.model.norms import norm_parameters
from layershare.plan.edits import Edit, sharing
from layershare.plan.evidence import Evidence
from layershare.plan.layout import compositions
from layershare.recipe import Refine
from layershare.solve.apply import Factored, compressed
from layershare.store import Store


def require_refinable(edits: tuple[Edit, ...]) -> None:
    """Raise `LayershareError` if nothing in a plan has factors."""
    if not sharing(edits):
        raise LayershareError("The plan shares no weights, so no block has factors to refine; leave out refine.")


@torch.no_grad()
def refine_blocks(factored: Factored, store: Store, evidence: Evidence, options: Refine, seed: int) -> dict[str, Any]:
    """Refine every block that is not in `store` yet, in order; from then on `factored` has its tensors.

    The calibration text passes through the original and through the compressed blocks. A step takes
    `options.batch_size` rows of it, one of the evidence's batches after the other. The factors are trained in float32,
    rounded to the dtype that they are stored in whenever the block runs, and kept as they were after the best epoch,
    where epoch 0 is the unrefined block. Returns the options and, under `blocks`, layer -> the relative error
    ‖block(X) − block′(X′)‖² / ‖block(X)‖² at the `start` and at the end (`error`), and the `epoch` that was kept.
    """
    spec = factored.spec
    require_refinable(factored.plan.edits)
    targets, inputs = evidence.stream(), evidence.stream()
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
                best, found = _fit(same, names, targets, inputs, options, generator, step)
                store.write(unit, {f"{place}.{name}": tensor for name, tensor in best.items()}, found)
                factored.take(store, unit)
            inputs.run()
        if names:
            facts[str(layer)] = store.facts(unit)
    evidence.progress(1, 1)
    return {**asdict(options), "blocks": facts}


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
    options: Refine,
    generator: torch.Generator,
    step: Callable[[int], None],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the named parameters of the compressed block and leave them at their best; returns them, and facts."""
    parameters = {name: block.get_parameter(name) for name in names}
    wide = {name: parameter.detach().float().clone().requires_grad_() for name, parameter in parameters.items()}
    n = len(inputs.batches)
    norm = sum(float(_goal(targets, batch).square().sum()) for batch in range(n))

    def error(batch: int) -> Tensor:
        """The batch's part of the relative error."""
        args, kwargs = inputs.call(batch)
        rounded = {name: tensor.to(parameters[name].dtype) for name, tensor in wide.items()}
        output = hidden_output(functional_call(block, rounded, args, kwargs)).float()
        return (output - _goal(targets, batch).to(output.device)).square().sum() / norm

    def whole_error() -> float:
        return sum(float(error(batch)) for batch in range(n))

    def snapshot() -> dict[str, Tensor]:
        return {name: tensor.detach().to(parameters[name].dtype, copy=True) for name, tensor in wide.items()}

    together = max(1, options.batch_size // inputs.batches.size)
    optimizer = torch.optim.AdamW(wide.values(), lr=options.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * -(-n // together))
    with evaluating(block):
        start = least = whole_error()
        best, kept = snapshot(), 0
        for epoch in range(1, options.epochs + 1):
            step(epoch - 1)
            for batches in torch.randperm(n, generator=generator).split(together):
                optimizer.zero_grad()
                for batch in batches.tolist():
                    with torch.enable_grad():
                        loss = error(batch) * (n / len(batches))
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


def _goal(targets: Stream, batch: int) -> Tensor:
    """What the original block gives for a batch, in float32."""
    return targets.batches.rows(targets.outputs, batch).float()
