"""Rotate and slice a model block after block (SliceGPT).

The pass never runs a narrower model. Blocks run in the width that they have, with the norms' weights and means absorbed
by their neighbours, and a projection QQᵀ stands wherever the sliced model keeps the components Q alone: that gives, up
to rounding, the sliced model's hidden states in the original coordinates, which the next Q is found from.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layershare.calibrate.drivers.calls import Call, hidden_input, with_hidden_input
from layershare.calibrate.measures import InputGrams, gram_of
from layershare.errors import LayershareError
from layershare.formulas.linalg import principal_axes
from layershare.model.arch import Spec
from layershare.model.norms import affine
from layershare.model.prenorm import PreNorm, SubLayer
from layershare.model.sliced import sliced_sublayer, standing_in
from layershare.plan.edits import Slice
from layershare.plan.evidence import Evidence
from layershare.plan.method import Unit
from layershare.plan.slices import shortcut_name, sliced_tensors
from layershare.store import Store

Layer = tuple[Tensor, Tensor | None]
"""Weight, d_in × d_out, and bias of a linear."""

_PANEL = 4096
"""Rows of embedding and head that are widened to float64 at once."""


def reading(layer: Layer, scale: Tensor, shift: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
    """W′ = Qᵀdiag(scale)W and b′ = b + shiftᵀW (float64): what a reader W: d × m of scale ⊙ x̂ + shift does to x̂Q.

    Without `q` (d × width), Q = 1.
    """
    weight, bias = layer
    wide = weight.double()
    moved = shift @ wide
    scaled = scale[:, None] * wide
    return scaled if q is None else q.double().T @ scaled, moved if bias is None else moved + bias.double()


def writing(layer: Layer, centered: bool, q: Tensor | None) -> Layer:
    """W′ = WMQ and b′ = bMQ (float64) of a writer W: m × d; M = 1 − 11ᵀ/d if the norms subtract the mean, else 1."""

    def turned(rows: Tensor) -> Tensor:
        wide = rows.double()
        wide = wide - wide.mean(-1, keepdim=True) if centered else wide
        return wide if q is None else wide @ q.double()

    weight, bias = layer
    return turned(weight), None if bias is None else turned(bias)


def shortcut(before: Tensor, after: Tensor, multiplier: float) -> Tensor:
    """(QᵀQ′ − 1)/m, width × width (float64): what a writer adds to the residual, which the block multiplies by m."""
    product = before.double().T @ after.double()
    return (product - torch.eye(len(product), dtype=product.dtype, device=product.device)) / multiplier


def slice_units(spec: Spec, width: int) -> tuple[Unit, ...]:
    """The embeddings, block after block, and the head."""
    names = ["embeddings", *(f"layer-{layer:03d}" for layer in range(spec.n_layers)), "head"]
    return tuple(Unit(f"slice-{width}.{name}", (Slice(width),)) for name in names)


def slice_model(width: int, solved: Store, evidence: Evidence) -> None:
    """Rotate and slice the embeddings, block after block, and the head, each stored as soon as it is done.

    The calibration text passes through the dense blocks. A block takes two passes of it: the first, with the attention
    sliced on its input side, gives the signal that enters the MLP; the second, with what the attention writes sliced
    too, the signal that leaves the block. A block that is done takes the second pass alone. Raises `LayershareError` if
    a sliced weight is not finite.
    """
    slicing = Slicing(evidence, solved, width)
    if all(unit.name in solved for unit in slicing.units):
        return
    n_layers = evidence.spec.n_layers
    axes = torch.empty(0)
    for layer, block in slicing.stream:
        evidence.progress(layer, n_layers)
        if layer == 0:
            axes = slicing.embeddings()
        axes = slicing.block(layer, block, axes)
    slicing.head(axes)
    evidence.progress(n_layers, n_layers)


class Slicing:
    """A pass through a model that slices it: where the text is, what is stored, and the width of hidden states."""

    def __init__(self, evidence: Evidence, solved: Store, width: int) -> None:
        self.spec, self.residual = evidence.spec, evidence.spec.sliceable()
        self.weights, self.solved, self.width = evidence.weights, solved, width
        self.stream, self.units = evidence.stream(), slice_units(evidence.spec, width)

    def embeddings(self) -> Tensor:
        """Slice the embeddings by what they add up to; returns the components Q (D × width) that are left."""
        unit, stream, residual = self.units[0].name, self.stream, self.residual
        if unit not in self.solved:
            entering = (hidden_input(stream.call(batch)) for batch in range(len(stream.batches)))
            axes, lost = principal_axes(gram_of(_centered(x, residual) for x in entering), self.width)
            tensors = {}
            for name in residual.embeddings:
                full = f"{self.spec.base_prefix}{name}.weight"
                weight = self.weights.tensor(full)
                panels = (rows.to(axes.device) for rows in weight.split(_PANEL))
                turned = (writing((p, None), residual.centered, axes)[0].to(weight.dtype) for p in panels)
                tensors[full] = torch.cat(list(turned))
            self._write(unit, tensors, {"leaving": axes}, {"embeddings": lost})
        return self._axes(unit, "leaving")

    @torch.no_grad()
    def block(self, layer: int, block: nn.Module, entering: Tensor) -> Tensor:
        """Slice a block, if it is not stored, and run it as sliced; returns the components that leave it."""
        spec, residual, unit, stream = self.spec, self.residual, self.units[1 + layer].name, self.stream
        place, called = f"{spec.block(layer)}.", f"layer-{layer:03d}"
        parts = [_Dense(part, block, place) for part in residual.sublayers[2 * layer : 2 * layer + 2]]
        attention, mlp = parts
        whole: dict[str, Any] = {}
        for dense in parts:
            modules: dict[str, Any] = sliced_sublayer(dense.module, dense.part, residual, residual.width)
            for name, pair in dense.turned(residual, None, None).items():
                _fill(modules[name], pair)
            modules[dense.part.writer].shortcut.weight.zero_()
            whole |= {name.removeprefix(place): module.requires_grad_(False) for name, module in modules.items()}
        done, lost = unit in self.solved, {}
        with standing_in(block, whole), _projected(block, entering, residual):
            if done:
                between = self._axes(unit, "between")
            else:
                inputs = InputGrams({"between": mlp.part.norm.removeprefix(place)})
                with inputs.attach(block):
                    stream.run()
                between, lost[f"{called}.attention"] = principal_axes(inputs.finish()["between"], self.width, entering)
            writer = whole[attention.part.writer.removeprefix(place)]
            projection = between.double() @ between.double().T
            _fill(writer, writing(attention.layer(attention.part.writer), residual.centered, projection))
            whole_width = torch.eye(len(projection), dtype=projection.dtype, device=projection.device)
            writer.shortcut.weight.copy_(shortcut(projection, whole_width, attention.part.multiplier).T)
            stream.run()
        if not done:
            leaving = (stream.batches.rows(stream.outputs, i).to(between.device) for i in range(len(stream.batches)))
            after, lost[f"{called}.mlp"] = principal_axes(gram_of(leaving), self.width, between)
            tensors = {}
            for dense, q_in, q_out in ((attention, entering, between), (mlp, between, after)):
                for name, (weight, bias) in dense.turned(residual, q_in, q_out).items():
                    conv1d = isinstance(dense.module(name), Conv1D)
                    tensors[f"{spec.base_prefix}{name}.weight"] = weight if conv1d else weight.T
                    tensors[f"{spec.base_prefix}{name}.bias"] = bias
                tensors[shortcut_name(spec, dense.part.writer)] = shortcut(q_in, q_out, dense.part.multiplier).T
            self._write(unit, tensors, {"between": between, "leaving": after}, lost)
        return self._axes(unit, "leaving")

    def head(self, axes: Tensor) -> None:
        """Slice the head, if it is not stored, with the final norm absorbed."""
        spec, residual, weights, unit = self.spec, self.residual, self.weights, self.units[-1].name
        if unit in self.solved:
            return
        norm = weights.model.base_model.get_submodule(residual.final_norm)
        prefix = f"{spec.base_prefix}{residual.final_norm}"
        own = {name: weights.tensor(f"{prefix}.{name}") for name, _ in norm.named_parameters()}
        scale, shift = (each.to(axes.device) for each in affine(norm, own, residual.width))
        name = f"{residual.head}.weight"
        weight = weights.tensor(weights.model.all_tied_weights_keys.get(name, name))
        bias = f"{residual.head}.bias"
        biases = weights.tensor(bias) if bias in spec.tensors else weight.new_zeros(len(weight))
        panels = zip(weight.split(_PANEL), biases.split(_PANEL), strict=True)
        read = [reading((rows.to(axes.device).T, b.to(axes.device)), scale, shift, axes) for rows, b in panels]
        sliced = {name: torch.cat([rows.T.to(weight.dtype) for rows, _ in read]), bias: torch.cat([b for _, b in read])}
        self._write(unit, sliced, {}, {})

    def _write(self, unit: str, tensors: dict[str, Tensor], axes: dict[str, Tensor], lost: dict[str, float]) -> None:
        """Store a unit: of the tensors those that the checkpoint has, in its dtypes, and what a resumed run needs."""
        layout = sliced_tensors(self.spec, self.width)
        stored = {name: tensor.to(layout[name][1]) for name, tensor in tensors.items() if name in layout}
        for name, tensor in stored.items():
            if not tensor.isfinite().all():
                raise LayershareError(f"'{name}' does not fit {tensor.dtype} when it is rotated; use a wider dtype.")
        self.solved.write(unit, stored | axes, {place: {"error": error} for place, error in lost.items()})

    def _axes(self, unit: str, name: str) -> Tensor:
        return self.solved.read(unit, name).to(self.weights.device)


@dataclass(frozen=True)
class _Dense:
    """A sub-layer of a block as it was, the block being at `place` in the base model."""

    part: SubLayer
    block: nn.Module
    place: str

    def module(self, name: str) -> Any:
        """A module of the block by its name in the base model."""
        return self.block.get_submodule(name.removeprefix(self.place))

    def layer(self, name: str) -> Layer:
        """Weight and bias of a linear."""
        module = self.module(name)
        return module.weight if isinstance(module, Conv1D) else module.weight.T, module.bias

    def turned(self, residual: PreNorm, q_in: Tensor | None, q_out: Tensor | None) -> dict[str, Layer]:
        """The linears, by name, with the norm absorbed, for hidden states xQ that come in and those that go out."""
        norm, part = self.module(self.part.norm), self.part
        device = self.module(part.writer).weight.device
        scale, shift = (each.to(device) for each in affine(norm, dict(norm.named_parameters()), residual.width))
        layers: dict[str, Layer] = {name: reading(self.layer(name), scale, shift, q_in) for name in part.readers}
        return {**layers, part.writer: writing(self.layer(part.writer), residual.centered, q_out)}


def _fill(module: Any, layer: Layer) -> None:
    weight, bias = layer
    module.weight.copy_(weight if isinstance(module, Conv1D) else weight.T)
    if module.bias is not None:
        assert bias is not None
        module.bias.copy_(bias)


@contextmanager
def _projected(block: nn.Module, axes: Tensor, residual: PreNorm) -> Iterator[None]:
    """The block with the projection QQᵀ of what enters it, for the duration."""

    def project(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        x = hidden_input((args, kwargs))
        wide = _centered(x.to(torch.promote_types(x.dtype, torch.float32)), residual)
        q = axes.to(wide.dtype)
        return with_hidden_input((args, kwargs), (wide @ q @ q.T).to(x.dtype))

    hook = block.register_forward_pre_hook(project, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _centered(x: Tensor, residual: PreNorm) -> Tensor:
    return x - x.mean(-1, keepdim=True) if residual.centered else x
