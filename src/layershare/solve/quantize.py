"""Store the matrices of a finished model in few bits: rounded, or by GPTQ under the Gram that each really meets.

Every linear of a block is a sum of products of factors, a dense one of one factor alone; all factors are quantized.
With a text, block after block: the text passes through the blocks that are quantized already, so that each block meets
the inputs that these produce. Within a block the factors that meet the inputs of its linears come first; then the
block runs again, so that second factors meet the z of first ones that are quantized; those that are a layer's own are
fitted to these before. What layers of several blocks share is quantized with its first block, under the sum of the
Grams that it meets in all of them, which a pass before measures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layershare.calibrate.measures import InputGrams
from layershare.calibrate.stream import Stream
from layershare.formulas.quantize import (
    best_scales,
    compensated,
    dense_weight,
    fitted_to,
    packed,
    rounded,
    stored_scales,
)
from layershare.model.arch import find_blocks
from layershare.model.composition import Composition, Factor, alone
from layershare.model.describe import role_of
from layershare.model.layers import ComposedLinear, made_part, unpivoted
from layershare.model.swap import member_of, swap_modules
from layershare.model.weights import Weights
from layershare.progress import Progress

Stored = Callable[[Composition], Composition | None]
"""What a composition becomes as integers, its factors with their storage; `None` where it stays as it is."""


@dataclass(frozen=True)
class _Part:
    """A factor where it is registered: its name relative to the stack of blocks, the place in its product, and the
    block that it is stored in, where several blocks use it (`wide`) or that one alone.

    `follows`: the layer whose own second factor it is, and the first one, with its name.
    """

    name: str
    factor: Factor
    depth: int
    layer: int
    wide: bool
    follows: tuple[str, Factor, str] | None


@torch.no_grad()
def quantize_factors(
    model: PreTrainedModel,
    compositions: Sequence[Composition],
    stored: Stored,
    dtype: torch.dtype,
    *,
    tokens: Tensor | None,
    batch_size: int,
    progress: Progress,
    scratch: Path | None = None,
) -> tuple[tuple[Composition, ...], dict[str, float]]:
    """Quantize factors of a model in place, those of `compositions` and what is dense in its blocks; biases stay.

    `stored` says of each composition how. Scales are such as fit `dtype`, the one in which they will be stored.
    `tokens` [n, length]: the text, `batch_size` rows of which pass at a time, hidden states in files in `scratch`, if
    given; `None` rounds. Returns the new compositions, and for each factor what
    quantizing it lost: ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² under its inputs X, without a text ‖W − Ŵ‖² / ‖W‖². Raises
    `LayershareError` for inputs that overflow.
    """
    stack, blocks = find_blocks(model)
    base = model.base_model
    new = [found for each in compositions if (found := stored(each)) is not None]
    kept = [each for each in compositions if stored(each) is None]
    new += _factors_of_dense(base, stack, stored)
    parts = [part for each in new for part in _parts(each, stack)]
    errors: dict[str, float] = {}
    if tokens is None:
        for part in parts:
            errors[part.name] = _quantize(blocks, part, None, dtype)
    else:
        stream = Stream(Weights.of(model), tokens, batch_size, scratch)
        _pass_through(stream, blocks, parts, dtype, errors, progress)
    for composition in new:
        for name in composition.names:
            layer: Any = base.get_submodule(name)
            layer.composition, layer.terms = composition, composition.terms_of(name)
    return (*kept, *new), errors


def _pass_through(
    stream: Stream,
    blocks: nn.ModuleList,
    parts: Sequence[_Part],
    dtype: torch.dtype,
    errors: dict[str, float],
    progress: Progress,
) -> None:
    """Quantize all parts, block after block of the stream."""
    wide = InputGrams({part.name: part.name for part in parts if part.wide})
    grams: dict[str, Tensor] = {}
    followed = {part.follows[2] for part in parts if part.follows}
    floats: dict[str, Tensor] = {}  # the first factors as they were
    passes = 1 + any(part.wide for part in parts)
    if passes > 1:
        with wide.attach(blocks):
            for layer, _ in stream:
                progress(layer, passes * len(blocks))
        grams = wide.finish()
    for layer, _ in stream:
        progress(layer + (passes - 1) * len(blocks), passes * len(blocks))
        here = [part for part in parts if part.layer == layer]
        for depth in sorted({part.depth for part in here}):
            now = [part for part in here if part.depth == depth]
            heard = {part.name for part in now if not part.wide} | {part.follows[0] for part in now if part.follows}
            if heard:
                inputs = InputGrams({name: name for name in heard})
                with inputs.attach(blocks):
                    stream.run()
                grams |= inputs.finish()
            for part in now:
                weight = blocks.get_submodule(part.name).get_parameter("weight")
                if part.follows:
                    weight.copy_(_fitted(blocks, part, weight, floats, grams[part.follows[0]]))
                if part.name in followed:
                    floats[part.name] = weight
                errors[part.name] = _quantize(blocks, part, grams[part.name], dtype)
            grams = {part.name: grams[part.name] for part in parts if part.wide and part.name not in errors}
        floats = {part.name: floats[part.name] for part in parts if part.wide and part.name in floats}
        stream.run()
    progress(1, 1)


def _factors_of_dense(base: Any, stack: str, stored: Stored) -> list[Composition]:
    """Make each dense linear that is to be quantized a layer of one factor, in place; returns what they will be."""
    modules = dict(base.named_modules())
    dense: dict[str, Any] = {
        name: module
        for name, module in modules.items()
        if name.startswith(f"{stack}.")
        and isinstance(module, nn.Linear | Conv1D)
        and role_of(name) is not None
        and not isinstance(modules[name.rpartition(".")[0]], ComposedLinear)
    }
    wanted = [alone(member_of(name, module)) for name, module in dense.items()]
    found = [each for each in wanted if stored(each) is not None]
    swap_modules(base, found)
    for composition in found:
        (member,), (factor,) = composition.members, composition.factors
        weight = dense[member.name].weight
        part = base.get_submodule(member.name).part(factor)
        part.weight = nn.Parameter((weight.T if member.conv1d else weight).contiguous(), requires_grad=False)
    return [new for each in found if (new := stored(each)) is not None]


def _parts(composition: Composition, stack: str) -> list[_Part]:
    """The factors of a composition where they are registered."""

    def inside(name: str) -> str:
        return name.removeprefix(f"{stack}.")

    def layer_of(name: str) -> int:
        return int(inside(name).partition(".")[0])

    depths = {factor: depth for term in composition.terms for depth, factor in enumerate(term.factors)}
    found = []
    for member, factor in composition.stored():
        users = composition.users(factor) if factor.home else (member,)
        wide = len({layer_of(user.name) for user in users}) > 1
        name = inside(f"{member.name}.{factor.name}")
        follows = None
        if depths[factor] == 1 and factor.home is None:
            (first,) = (term.factors[0] for term in composition.terms if factor in term.factors)
            follows = inside(member.name), first, inside(f"{first.home or member.name}.{first.name}")
        found.append(_Part(name, factor, depths[factor], layer_of(member.name), wide, follows))
    return found


def _fitted(blocks: nn.ModuleList, part: _Part, weight: Tensor, floats: dict[str, Tensor], gram: Tensor) -> Tensor:
    """A second factor's weight, fitted to the first one, which is quantized, under the Gram of the layer's inputs."""
    assert part.follows is not None
    name, factor, place = part.follows
    layer: Any = blocks.get_submodule(name)
    first, quantized = floats[place], layer.part(factor).weight
    if factor.pivots:
        order = layer.order(factor)
        first, quantized = (unpivoted(each, order, factor.pivots) for each in (first, quantized))
    return fitted_to(first, weight, quantized, gram)


def _quantize(blocks: nn.ModuleList, part: _Part, gram: Tensor | None, dtype: torch.dtype) -> float:
    """Put a quantized linear in a part's place, and return the relative error."""
    weight, storage = blocks.get_submodule(part.name).get_parameter("weight"), part.factor.storage
    assert storage is not None
    columns = weight.shape[1]
    scales = best_scales(weight, storage, dtype, None if gram is None else gram.diagonal())
    codes = rounded(weight, scales, storage) if gram is None else compensated(weight, gram, scales, storage)
    new: Any = made_part(part.factor, columns, weight.shape[0], device=weight.device, dtype=weight.dtype)
    for name, tensor in {"codes": packed(codes, storage.bits), **stored_scales(scales, storage)}.items():
        new.get_buffer(name).copy_(tensor)
    blocks.set_submodule(part.name, new)
    whole = weight.double()
    missing = whole - dense_weight(new.stored, storage, columns, torch.float64)
    lost, all_ = (
        float((each.square() if gram is None else each @ gram.double() * each).sum()) for each in (missing, whole)
    )
    return lost / all_ if all_ else 0.0
