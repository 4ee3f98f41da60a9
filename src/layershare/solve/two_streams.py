"""Fit a compressed model's own factors, and what stayed dense, to the outputs of the original: two streams of text.

The text passes through the original and through the compressed blocks side by side. Where a matrix W of the original
reads X and its stand-in PC reads X′, C minimises ‖XW − X′PC‖² with P fixed, which takes from the text only G′ = X′ᵀX′
and K = X′ᵀX: C = (PᵀG′P)⁻¹PᵀKW. So each site makes up for what the compressed ones before it have changed. Sites are
fitted in the order in which data flows through a block, each seeing those before it fitted.

Few tokens overfit. So λ pulls towards the coefficients C₀ that are there, (PᵀG′P + λ1)C = PᵀKW + λC₀, and λ is, for
every matrix, the one of `RIDGES` whose error is least on blocks of text that were held out; C₀ itself is among them.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layershare.calibrate.drivers.calls import Call
from layershare.calibrate.stream import Stream
from layershare.formulas.linalg import ridge_fits
from layershare.model.arch import Linear
from layershare.model.modes import evaluating
from layershare.model.weights import twin
from layershare.plan.edits import dropped_parts, sharing
from layershare.plan.evidence import Evidence
from layershare.solve.apply import Factored, Replaced, compressed, exchanged, fitted_terms

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""What λ may be, relative to the mean eigenvalue of PᵀG′P."""


@dataclass
class Moments:
    """G′ = X′ᵀX′ and K = X′ᵀX (d_in × d_in, float32) of the inputs of a site."""

    gram: Tensor
    cross: Tensor

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> "Moments":
        """Of no tokens."""
        return cls(*(torch.zeros(width, width, device=device) for _ in range(2)))

    def add(self, small: Tensor, dense: Tensor) -> None:
        """Add some tokens, X′ and X [tokens, d_in]."""
        small, dense = small.float(), dense.float()
        self.gram.addmm_(small.T, small)
        self.cross.addmm_(small.T, dense)


@torch.no_grad()
def refit_to_original(
    factored: Factored, evidence: Evidence, metric: Callable[[Evidence, Linear], Tensor | None]
) -> None:
    """Fit every layer that is not stored yet, block after block; from then on `factored` has its tensors.

    What is the layer's own is fitted: last factors, and matrices that stayed dense; deltas stay as they are.
    `metric` gives R with RᵀR what errors in a linear's outputs count where λ is chosen; `None`: all the same.
    """
    spec = factored.spec
    shared, dropped = sharing(factored.plan.edits), dropped_parts(factored.plan.edits)
    original, small = (evidence.stream(evidence.text, evidence.held_out) for _ in range(2))
    for (layer, block), (_, same) in zip(original, small, strict=True):
        evidence.progress(layer, spec.n_layers)
        original.run()
        done = factored.refitted(layer)
        dense = twin(block)
        here = [x for x in spec.linears if x.layer == layer and (layer, x.part) not in dropped]
        inside = {spec.within(layer, x.name): x for x in here}
        own = [f"{name}.weight" for name, x in inside.items() if (x.role, x.layer) not in shared]
        with compressed(same, layer, factored, own) as replaced:
            if not done:
                new: dict[str, Tensor] = {}
                for site in dict.fromkeys(x.site for x in inside.values()):
                    readers = {name: x for name, x in inside.items() if x.site == site}
                    first = next(iter(readers))
                    train, test = _measure(first, dense, original, same, small, len(evidence.text.tokens))
                    for name, linear in readers.items():
                        weight = linear.matrix(dense.get_parameter(f"{name}.weight"))
                        fit = _Fit(weight, train, test, metric(evidence, linear))
                        if linear.name in replaced:
                            new |= _fit_factors(factored, replaced[linear.name], fit)
                        else:
                            new |= _fit_dense(factored, linear, same.get_submodule(name), fit)
                factored.write_refit(layer, new)
            small.run()
        del replaced, dense  # or they would stay until the next layer's are there
    evidence.progress(spec.n_layers, spec.n_layers)


def _measure(
    reader: str, dense: nn.Module, original: Stream, same: nn.Module, small: Stream, fitted: int
) -> tuple[Moments, Moments]:
    """The moments of what a module is given, of the first `fitted` blocks of text and of those that are held out."""
    found: list[Moments] = []
    for parts in original.batches.split(fitted):
        moments = None
        for batch, rows in parts:
            y, x = _input(same, reader, small.call(batch)), _input(dense, reader, original.call(batch))
            if moments is None:
                moments = Moments.zeros(x.shape[-1], x.device)
            count = len(original.batches.rows(original.batches.tokens, batch))
            moments.add(*(states.reshape(count, -1, states.shape[-1])[rows].flatten(0, 1) for states in (y, x)))
        assert moments is not None  # neither part is empty
        found.append(moments)
    return found[0], found[1]


def _fit_factors(factored: Factored, x: Replaced, fit: "_Fit") -> dict[str, Tensor]:
    """Set the last factors that are a linear's own, and return what changed by its name in the checkpoint."""
    module, terms = x.module, fitted_terms(x)
    if x.composition.whole or not terms:
        return {}
    others = [module.product(term.factors, wide=True).T for term in module.terms if term not in terms]
    bases = [module.product(term.factors[:1], wide=True).T for term in terms]
    present = torch.cat([module.product(term.factors[1:], wide=True).T for term in terms])
    best = fit.best(torch.cat(bases, 1), present, others)
    new = {}
    if best is not None:
        for term, coef in zip(terms, best.split([basis.shape[1] for basis in bases]), strict=True):
            for factor, value in exchanged(module, term, coef).items():
                module.part(factor).weight.copy_(value)
                for key in factor.keys:
                    new[f"{factored.spec.base_prefix}{x.linear.name}.{key}"] = module.state_dict()[key]
    return new


def _fit_dense(factored: Factored, linear: Linear, module: Any, fit: "_Fit") -> dict[str, Tensor]:
    """The same of a linear that stayed dense."""
    best = fit.best(torch.eye(linear.d_in, device=module.weight.device), linear.matrix(module.weight), [])
    if best is None:
        return {}
    module.weight.copy_(linear.matrix(best))
    return {factored.spec.weight_name(linear): module.weight.detach().clone()}


@dataclass(frozen=True)
class _Fit:
    """What a matrix is fitted to: W (d_in × d_out), the moments of its inputs, and the root of its outputs' metric."""

    weight: Tensor
    train: Moments
    test: Moments
    root: Tensor | None

    def best(self, basis: Tensor, present: Tensor, others: list[Tensor]) -> Tensor | None:
        """The coefficients (k × d_out) of least error on the held-out text; `None` for those that are there.

        `others`: what other products of the matrix give, d_in × d_out each.
        """
        basis, present = basis.double(), present.double()

        def moments(of: Moments) -> tuple[Tensor, Tensor]:
            """PᵀG′P and Pᵀ(KW − G′D), D the sum of `others`."""
            gram = of.gram.double()
            target = of.cross.double() @ self.weight.double()
            for other in others:
                target -= gram @ other.double()
            return basis.T @ gram @ basis, basis.T @ target

        normal, target = moments(self.test)

        def error(coef: Tensor) -> float:
            """‖XW − X′PC‖² up to a constant."""
            weighed, aim = (coef, target) if self.root is None else (coef @ self.root.T, target @ self.root.T)
            return float((weighed * (normal @ weighed - 2 * aim)).sum())

        fits = [present, *ridge_fits(*moments(self.train), present, RIDGES)]
        errors = [error(fit) for fit in fits]
        best = errors.index(min(errors))
        return fits[best] if best else None


class _Reached(Exception):
    """Raised inside a block that need not run on."""


def _input(block: nn.Module, name: str, call: Call) -> Tensor:
    """What a module of a block is given when the block is called; the rest of the block does not run."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _Reached

    hook = block.get_submodule(name).register_forward_pre_hook(stop)
    args, kwargs = call
    try:
        with evaluating(block), suppress(_Reached):
            block(*args, **kwargs)
    finally:
        hook.remove()
    return found[0]
