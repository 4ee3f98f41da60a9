"""Carry out a plan: solve unit by unit, and fit coefficients again."""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layershare.calibrate.measures import InputGrams, site_modules
from layershare.calibrate.stream import Stream
from layershare.formulas.linalg import pivoted, refit
from layershare.model.arch import Linear, Spec, common_parent
from layershare.model.composition import Composition, Factor, Term
from layershare.model.dropped import DroppedAttention, drop_mlp
from layershare.model.layers import ComposedLinear
from layershare.model.weights import Weights
from layershare.plan.edits import Delta, Share, composition, dropped_parts
from layershare.plan.evidence import Evidence
from layershare.plan.layout import compositions, origins
from layershare.plan.method import Method
from layershare.plan.plan import Plan
from layershare.store import Store

UNITS = "units"
"""The folder of solved units."""
INTEGERS = "integers"
"""The one unit of what is quantized, and its folder."""


@dataclass(frozen=True)
class Replaced:
    """A linear, its dense weight where the model keeps it, what stands in its place, and the composition of that."""

    linear: Linear
    weight: Tensor
    module: ComposedLinear
    composition: Composition


class Factored:
    """A plan carried out: solved units on disk, and every tensor of the checkpoint by the name that it has there."""

    def __init__(self, spec: Spec, plan: Plan, weights: Weights, folder: Path, identity: dict[str, Any]) -> None:
        self.spec, self.plan, self.weights = spec, plan, weights
        self.solved = Store(folder / UNITS, identity)
        self.identity = {**identity, "edits": [asdict(edit) for edit in plan.edits]}
        self.refits = Store(folder / "refit", self.identity)
        self.found: dict[str, dict[str, Any]] = {}
        self._origins = origins(spec, plan.edits)
        self._places: dict[str, tuple[Store, str]] = {}

    def branch(self) -> "Factored":
        """The same, which may take other tensors from now on."""
        other = copy.copy(self)
        other.found, other._places = dict(self.found), dict(self._places)
        return other

    def solve(self, method: Method, evidence: Evidence) -> None:
        """Solve what is not solved yet, each unit stored as soon as it is done. Raises as `Method.solve` does."""
        method.carry_out(self.plan.edits, self.solved, evidence)
        for unit in method.units(self.spec, self.plan.edits):
            self.has(unit.name)

    def has(self, unit: str) -> bool:
        """Whether a unit is solved; if so, its tensors come from it from now on."""
        there = self.take(self.solved, unit)
        if there:
            self.found |= self.solved.facts(unit)
        return there

    def refitted(self, layer: int) -> bool:
        """Whether a layer's refit is there; if so, its tensors come from it from now on."""
        return self.take(self.refits, f"layer-{layer:03d}")

    def write_refit(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Store what a layer's refit changed."""
        self.refits.write(f"layer-{layer:03d}", tensors)
        self.refitted(layer)

    def take(self, store: Store, unit: str) -> bool:
        """Whether a unit is in a store; if so, its tensors come from there from now on."""
        if unit in store:
            self._places.update(dict.fromkeys(store.names(unit), (store, unit)))
        return unit in store

    def store_as(self, plan: Plan, store: Store) -> None:
        """Become a plan that stores the same as integers, which are in a store."""
        self.plan, self._origins = plan, origins(self.spec, plan.edits)
        self.take(store, INTEGERS)

    def replaces(self, name: str) -> bool:
        """Whether a tensor of this full name is not as the model has it."""
        return name in self._places

    def tensor(self, name: str) -> Tensor:
        """A tensor of the compressed checkpoint, by its full name."""
        if name in self._places:
            store, unit = self._places[name]
            return store.read(unit, name)
        return self.weights.combination(self._origins[name])

    def facts(self) -> dict[str, dict[str, Any]]:
        """Of each edit that was solved, by its id, rank, parameters and what its solution noted.

        `error` is Σ‖X(W − Ŵ)‖² / Σ‖XW‖² under the original model's inputs, before any refit; `spectrum` see
        `methods.low_rank.sampled`. Of a sliced model, by place, `error` is Σ‖X − XQQᵀ‖² / Σ‖X‖², X as the model that
        is sliced up to there makes it.
        """
        known = {
            edit.id: {"rank": edit.rank, "parameters": composition(self.spec, edit).parameters}
            for edit in self.plan.edits
            if isinstance(edit, Share | Delta)
        }
        return known | {name: known.get(name, {}) | facts for name, facts in self.found.items()}


@torch.no_grad()
def refit_coefficients(factored: Factored, evidence: Evidence) -> None:
    """Fit the coefficients of each layer again to the inputs that the compressed layers before it really produce.

    Block after block: one pass of the compressed block measures G′ᵢ = X′ᵢᵀX′ᵢ at its sites, its private factors are
    solved for anew with their bases fixed, and a second pass gives the next block's inputs. Of a pair y = (xF)L the
    second factor L is fitted; if it is shared (output side), A = WBᵀ(BBᵀ)⁻¹ does not depend on the inputs and stays.
    Within a block all sites are measured at once: o, gate, up and down get the inputs that the compressed, not yet
    refitted matrices before them give.
    """
    spec, stream = factored.spec, evidence.stream()
    for layer, block in stream:
        evidence.progress(layer, spec.n_layers)
        done = factored.refitted(layer)
        with compressed(block, layer, factored) as modules:
            if not done:
                factored.write_refit(layer, _refit_layer(layer, block, modules, factored, stream))
            stream.run()
        del modules  # or they would stay until the next layer's are there
    evidence.progress(spec.n_layers, spec.n_layers)


def _refit_layer(
    layer: int, block: nn.Module, modules: dict[str, Replaced], factored: Factored, stream: Stream
) -> dict[str, Tensor]:
    """Run the compressed block, set the second factors that are its own and return them by name."""
    spec = factored.spec
    fitted = {name: x for name, x in modules.items() if not x.composition.whole and fitted_terms(x)}
    needed = {x.linear.site for x in fitted.values()}
    inputs = InputGrams({site: name for site, name in site_modules(spec, layer).items() if site in needed})
    with inputs.attach(block):
        stream.run()
    grams = inputs.finish()
    new = {}
    for name, x in fitted.items():
        module, terms = x.module, fitted_terms(x)
        dense = x.linear.matrix(x.weight.to(module.coefficient.weight.device))
        for term in (term for term in module.terms if term not in terms):
            dense = dense.double() - module.product(term.factors, wide=True).T
        bases = [module.product(term.factors[:1], wide=False) for term in terms]
        fit = refit(torch.cat(bases).T, grams[x.linear.site], dense)
        for term, coef in zip(terms, fit.split([len(basis) for basis in bases]), strict=True):
            for factor, weight in exchanged(module, term, coef).items():
                module.part(factor).weight.copy_(weight)
                for key in factor.keys:
                    new[f"{spec.base_prefix}{name}.{key}"] = module.state_dict()[key]
    return new


def fitted_terms(x: Replaced) -> list[Term]:
    """The products whose last factor is the layer's own."""
    return [term for term in x.module.terms if not x.composition.joins(term.factors[-1])]


def exchanged(module: ComposedLinear, term: Term, coef: Tensor) -> dict[Factor, Tensor]:
    """The weights of a pair of factors whose second one becomes `coef` (k × d_out), with its pivots chosen anew."""
    first, second = term.factors
    if not second.pivots:
        return {second: coef.T}
    rest, order, mixing = pivoted(coef.T)
    module.order(second).copy_(order.argsort())
    return {first: mixing @ module.part(first).weight.double(), second: rest}


@contextmanager
def compressed(
    block: nn.Module, layer: int, factored: Factored, own: Collection[str] = ()
) -> Iterator[dict[str, Replaced]]:
    """A block as it is in the compressed model, for the duration; what it shares with others is a copy of its own.

    Yields linear's name -> what was replaced by what. Parameters of the names
    `own` (relative to the block) are copies that may be changed, as is everything that is replaced. A block read from
    disk lets go of its own copies of the dense weights.
    """
    spec, weights = factored.spec, factored.weights
    place = weights.block_name(layer)
    parameters, modules, replaced = {}, {}, {}
    for name, parameter in list(block.named_parameters()):
        if name in own or factored.replaces(f"{place}.{name}"):
            tensor = factored.tensor(f"{place}.{name}").to(parameter.device, parameter.dtype, copy=True)
            parameters[name] = parameter
            _set(block, name, nn.Parameter(tensor, requires_grad=False))
    linears = {linear.name: linear for linear in spec.linears if linear.layer == layer}
    for composed in compositions(spec, factored.plan.edits):
        if here := [name for name in composed.names if name in linears]:
            made = _composed(factored, composed, {name: block.get_submodule(spec.within(layer, name)) for name in here})
            for name, module in made.items():
                weight = weights.tensor(spec.weight_name(linears[name]))
                replaced[name] = Replaced(linears[name], weight, module, composed)
                inside = spec.within(layer, name)
                modules[inside] = weights.model.get_submodule(f"{place}.{inside}")
                block.set_submodule(inside, module)
    for dropped, part in dropped_parts(factored.plan.edits):
        names = [spec.within(layer, linear.name) for linear in spec.part(layer, part)]
        if dropped == layer and part == "attention":
            parent = common_parent(names)
            modules[parent] = block.get_submodule(parent)
            block.set_submodule(parent, DroppedAttention(modules[parent], layer))
        elif dropped == layer:
            modules |= drop_mlp(block, names)
    try:
        yield replaced
    finally:
        for name, module in modules.items():
            block.set_submodule(name, module)
        for name, parameter in parameters.items():
            _set(block, name, parameter)


def _composed(factored: Factored, composition: Composition, dense: Mapping[str, Any]) -> dict[str, ComposedLinear]:
    """Name -> what stands in the place of some members of a composition, the `dense` layers, with its tensors."""
    prefix, here = factored.spec.base_prefix, composition.within(dense)
    made: dict[str, ComposedLinear] = {}
    for name in here.names:
        place = {"device": dense[name].weight.device, "dtype": dense[name].weight.dtype}
        module = ComposedLinear(here, name, False, home=made.get(here.names[0]), **place)
        keys = [(factor.home or name, key) for factor in composition.factors for key in factor.keys]
        there = module.state_dict().keys()
        module.load_state_dict({key: factored.tensor(f"{prefix}{home}.{key}") for home, key in keys if key in there})
        module.requires_grad_(False)
        module.bias = dense[name].bias  # the model's own, which stays as it is
        made[name] = module
    return made


def _set(block: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(block.get_submodule(owner), attribute, parameter)
