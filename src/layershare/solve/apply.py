"""Carry out a plan: solve group by group, and fit coefficients again where the method asks for it."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layershare.calibrate.stats import Progress, measuring, site_modules
from layershare.calibrate.stream import Stream
from layershare.calibrate.text import Text
from layershare.errors import LayershareError
from layershare.methods.evidence import Evidence, row_convention
from layershare.methods.method import Method
from layershare.model.arch import Linear, Spec, common_parent
from layershare.model.dropped import DroppedAttention, drop_mlp
from layershare.model.layers import ComposedLinear, DeltaLinear, FactorLinear
from layershare.model.weights import Weights
from layershare.plan.budget import delta_parameters, share_parameters
from layershare.plan.edits import Delta, Share, dropped_parts, sharing, sliced_width
from layershare.plan.layout import delta_tensors, origins, share_tensors
from layershare.plan.plan import Plan
from layershare.solve.linalg import refit
from layershare.store import Store

SPECTRUM_POINTS = 64


class Factored:
    """A plan carried out: solved groups on disk, and every tensor of the checkpoint by the name that it has there."""

    def __init__(self, spec: Spec, plan: Plan, weights: Weights, folder: Path, identity: dict[str, Any]) -> None:
        self.spec, self.plan, self.weights = spec, plan, weights
        self.shares = [edit for edit in plan.edits if isinstance(edit, Share)]
        self.groups = Store(folder / "groups", identity)
        self.refits = Store(folder / "refit", {**identity, "edits": [unit_name(edit) for edit in self.shares]})
        self.width = sliced_width(plan.edits)
        self.slices = Store(folder / "slice", {**identity, "width": self.width})
        self.anchored = [edit for edit in plan.edits if isinstance(edit, Delta)]
        self.deltas = Store(folder / "deltas", {**identity, "edits": [f"{e.id}.{e.rank}" for e in self.anchored]})
        self._lost: dict[str, float] = {}
        self._found: dict[str, dict[str, Any]] = {}
        self._origins = origins(spec, plan.edits)
        self._places: dict[str, tuple[Store, str]] = {}
        for edit in self.shares:
            self._places.update(dict.fromkeys(factor_names(spec, edit), (self.groups, unit_name(edit))))

    def refitted(self, layer: int) -> bool:
        """Whether a layer's refit is there; if so, its tensors come from it from now on."""
        return self.take(self.refits, f"layer-{layer:03d}")

    def write_refit(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Store what a layer's refit changed."""
        self.refits.write(f"layer-{layer:03d}", tensors)
        self.refitted(layer)

    def sliced(self, unit: str) -> bool:
        """Whether a unit of a sliced model is there; if so, its tensors come from it from now on."""
        there = self.take(self.slices, unit)
        if there:
            self._lost |= self.slices.facts(unit)["errors"]
        return there

    def write_slice(self, unit: str, tensors: dict[str, Tensor], errors: dict[str, float]) -> None:
        """Store a unit of a sliced model, and the parts of the variance that it lost by place."""
        self.slices.write(unit, tensors, {"errors": errors})
        self.sliced(unit)

    def has_delta(self, unit: str) -> bool:
        """Whether a unit of layers with deltas is there; if so, its tensors come from it from now on."""
        there = self.take(self.deltas, unit)
        if there:
            self._found |= self.deltas.facts(unit)
        return there

    def write_delta(self, unit: str, tensors: dict[str, Tensor], facts: dict[str, dict[str, Any]]) -> None:
        """Store a unit of layers with deltas: the tensors of some `Delta`s, and dense ones that change along with them.

        All by their full names in the checkpoint; `facts`: id of a `Delta` -> what is known of it, such as its `error`.
        """
        self.deltas.write(unit, tensors, facts)
        self.has_delta(unit)

    def take(self, store: Store, unit: str) -> bool:
        """Whether a unit is in a store; if so, its tensors come from there from now on."""
        if unit in store:
            self._places.update(dict.fromkeys(store.names(unit), (store, unit)))
        return unit in store

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
        """Group -> rank, parameters, `error` and `spectrum` of its solution; place in a sliced model -> its `error`.

        `error` is Σ‖X(W − Ŵ)‖² / Σ‖XW‖² under the original model's inputs, before any refit; `spectrum` see `sampled`.
        Of a `Delta`, by its id, what was noted when it was written.
        Of a slice the error is Σ‖X − XQQᵀ‖² / Σ‖X‖², X as the model that is sliced up to there makes it.
        """
        places = {place: {"error": error} for place, error in self._lost.items()}
        deltas = {
            edit.id: {
                "rank": edit.rank,
                "parameters": delta_parameters(self.spec, edit),
                **self._found.get(edit.id, {}),
            }
            for edit in self.anchored
        }
        shares = {
            edit.id: {
                "rank": edit.rank,
                "parameters": share_parameters(self.spec, edit),
                **self.groups.facts(unit_name(edit)),
            }
            for edit in self.shares
        }
        return places | shares | deltas


def solve(
    factored: Factored, method: Method, evidence: Evidence, progress: Progress = lambda done, total: None
) -> None:
    """Solve every group that is not solved yet, one at a time, each stored as soon as it is done.

    Raises `LayershareError` if a weight or a factor is not finite, naming the place.
    """
    spec = factored.spec
    total = sum(spec.linear(edit.role, edit.layers[0]).parameters * len(edit.layers) for edit in factored.shares)
    done = 0
    for edit in factored.shares:
        progress(done, total)
        linears = members(spec, edit)
        if unit_name(edit) not in factored.groups:
            dense = [evidence.weight(linear) for linear in linears]
            factors = method.solve(edit, dense, [evidence.inputs(linear) for linear in linears])
            dtype = dense[0].dtype
            tensors = [tensor.T.to(dtype) for tensor in (factors.basis, *factors.coefs)]
            if not all(tensor.isfinite().all() for tensor in tensors):
                raise LayershareError(f"The factors of group '{edit.id}' do not fit {dtype}; use a wider dtype.")
            named = dict(zip(factor_names(spec, edit), tensors, strict=True))
            spectrum = None if factors.spectrum is None else sampled(factors.spectrum, edit.rank)
            factored.groups.write(unit_name(edit), named, {"error": factors.error, "spectrum": spectrum})
        done += sum(linear.parameters for linear in linears)
    progress(total, total)


@torch.no_grad()
def refit_coefficients(
    factored: Factored,
    text: Text,
    *,
    batch_size: int,
    scratch: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Fit the coefficients of each layer again to the inputs that the compressed layers before it really produce.

    Block after block: one pass of the compressed block measures G′ᵢ = X′ᵢᵀX′ᵢ at its sites, its private factors are
    solved for anew with their bases fixed, and a second pass gives the next block's inputs. Of a pair y = (xF)L the
    second factor L is fitted; if it is shared (output side), A = WBᵀ(BBᵀ)⁻¹ does not depend on the inputs and stays.
    Within a block all sites are measured at once: o, gate, up and down get the inputs that the compressed, not yet
    refitted matrices before them give.
    """
    spec = factored.spec
    by_layer: dict[int, list[tuple[Linear, Share]]] = {layer: [] for layer in range(spec.n_layers)}
    for edit in factored.shares:
        for linear in members(spec, edit):
            by_layer[linear.layer].append((linear, edit))
    stream = Stream(factored.weights, text.tokens, batch_size, scratch)
    for layer, block in stream:
        progress(layer, spec.n_layers)
        done = factored.refitted(layer)
        with compressed(block, layer, factored) as modules:
            if not done:
                fitted = [pair for pair in by_layer[layer] if pair[1].side == "input" or len(pair[1].layers) == 1]
                factored.write_refit(layer, _refit_layer(layer, block, modules, fitted, factored, stream))
            stream.run()
        del modules  # or they would stay until the next layer's are there
    progress(spec.n_layers, spec.n_layers)


def _refit_layer(
    layer: int,
    block: nn.Module,
    modules: dict[str, tuple[Tensor, ComposedLinear]],
    fitted: list[tuple[Linear, Share]],
    factored: Factored,
    stream: Stream,
) -> dict[str, Tensor]:
    """Run the compressed block, set the second factors of the `fitted` linears and return them by name."""
    spec = factored.spec
    needed = {linear.site for linear, _ in fitted}
    with measuring(block, {site: name for site, name in site_modules(spec, layer).items() if site in needed}) as grams:
        stream.run()
    new = {}
    for linear, edit in fitted:
        weight, module = modules[linear.name]
        first, second = module.parts()
        dense = row_convention(weight.to(second.weight.device), linear)
        second.weight.copy_(refit(first.weight.T, grams[linear.site], dense).T)
        new[_second_factor(spec, linear, edit)] = second.weight
    return new


def sampled(spectrum: Tensor, rank: int) -> dict[str, list[Any]]:
    """Some points of a spectrum for people: component numbers (from 1) and their shares of the sum, four digits each.

    All of a short spectrum; of a longer one numbers spaced evenly on a logarithmic scale, and the last that is kept.
    """
    n = len(spectrum)
    points = range(1, n + 1)
    if n > SPECTRUM_POINTS:
        points = torch.logspace(0, math.log10(n), SPECTRUM_POINTS, dtype=torch.float64).round().long().tolist()
    index = sorted({*points, rank})
    shares = spectrum / (spectrum.sum() or 1)
    return {"index": index, "share": [float(f"{float(shares[i - 1]):.4g}") for i in index]}


def members(spec: Spec, edit: Share) -> list[Linear]:
    """The linears of a group, its owner first."""
    return [spec.linear(edit.role, layer) for layer in edit.layers]


def factor_names(spec: Spec, edit: Share) -> list[str]:
    """Names of a group's tensors in the checkpoint: the basis, then each layer's coefficients."""
    return list(share_tensors(spec, edit))


def delta_names(spec: Spec, edit: Delta) -> list[str]:
    """Names of a `Delta`'s tensors in the checkpoint: the base, then down and up of each of its layers."""
    return list(delta_tensors(spec, edit))


def unit_name(edit: Share) -> str:
    """The name of a solved group's file."""
    return f"{edit.id}.{edit.side}.{edit.rank}"


def _second_factor(spec: Spec, linear: Linear, edit: Share) -> str:
    return f"{spec.base_prefix}{linear.name}.{'coef' if edit.side == 'input' else 'basis'}.weight"


@contextmanager
def compressed(
    block: nn.Module, layer: int, factored: Factored, own: Collection[str] = ()
) -> Iterator[dict[str, tuple[Tensor, ComposedLinear]]]:
    """A block as it is in the compressed model, for the duration; what it shares with others is a copy of its own.

    Yields linear's name -> (dense weight where the model keeps it, what stands in its place). Parameters of the names
    `own` (relative to the block) are copies that may be changed, as is everything that is replaced. A block read from
    disk lets go of its own copies of the dense weights.
    """
    spec, weights = factored.spec, factored.weights
    place, start = weights.block_name(layer), f"{spec.blocks}.{layer}."
    parameters, modules, replaced = {}, {}, {}
    for name, parameter in list(block.named_parameters()):
        if name in own or factored.replaces(f"{place}.{name}"):
            tensor = factored.tensor(f"{place}.{name}").to(parameter.device, parameter.dtype, copy=True)
            parameters[name] = parameter
            _set(block, name, nn.Parameter(tensor, requires_grad=False))
    for (role, user), edit in sharing(factored.plan.edits).items():
        if user == layer:
            linear = spec.linear(role, layer)
            name = linear.name.removeprefix(start)
            module = _composed(factored, linear, edit, block.get_submodule(name))
            replaced[linear.name] = (weights.tensor(spec.weight_name(linear)), module)
            modules[name] = weights.model.get_submodule(f"{place}.{name}")
            block.set_submodule(name, module)
    for dropped, part in dropped_parts(factored.plan.edits):
        names = [linear.name.removeprefix(start) for linear in spec.part(layer, part)]
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


def _composed(factored: Factored, linear: Linear, edit: Share | Delta, dense: Any) -> ComposedLinear:
    """What stands in the place of a dense layer, with its tensors."""
    spec = factored.spec
    full = f"{spec.base_prefix}{linear.name}"
    place = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    if isinstance(edit, Share):
        owner = f"{spec.base_prefix}{spec.linear(edit.role, edit.layers[0]).name}"
        module = FactorLinear(linear.d_in, linear.d_out, edit.rank, False, edit.side, linear.conv1d, **place)
        sources = {"basis.weight": owner, "coef.weight": full}
    else:
        anchor = f"{spec.base_prefix}{spec.linear(edit.role, edit.anchor).name}"
        rank = edit.rank if linear.layer in edit.layers else 0
        module = DeltaLinear(linear.d_in, linear.d_out, rank, False, linear.conv1d, **place)
        sources = {"base.weight": anchor} | ({"down.weight": full, "up.weight": full} if rank else {})
    module.load_state_dict({part: factored.tensor(f"{source}.{part}") for part, source in sources.items()})
    module.requires_grad_(False)
    module.bias = dense.bias  # the model's own, which stays as it is
    return module


def _set(block: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(block.get_submodule(owner), attribute, parameter)
