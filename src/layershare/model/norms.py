"""Norms: which parameters are theirs, and what one computes, found by asking it with numbers."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

_LARGE, _SMALL = 2.0**20, 2.0**-10
"""Sizes of probing inputs for which a norm's ε is negligible, and is not."""


class UnknownNorm(Exception):
    """The module computes something else than RMSNorm or LayerNorm; the message goes on from "because"."""


def norm_parameters(model: nn.Module) -> list[str]:
    """The names, within a model or block, of the parameters of its norms.

    A norm is a module without children whose parameters are vectors, a `weight` among them. (Vectors of other names are
    no norm's, such as those that shape the activation of Apertus.)
    """
    names = []
    for place, module in model.named_modules():
        own = dict(module.named_parameters())
        vectors = all(parameter.ndim == 1 for parameter in own.values())
        if "weight" in own and vectors and not any(module.children()):
            names += [f"{place}.{name}" for name in own]
    return names


@torch.no_grad()
def norm_kind(module: nn.Module, width: int) -> tuple[bool, bool, float]:
    """Whether a norm subtracts the mean and adds a bias, and its ε; found by asking it, its weights made up.

    Raises `UnknownNorm` if it computes something else than RMSNorm or LayerNorm.
    """
    draw = torch.Generator().manual_seed(0)
    made_up = {
        name: torch.rand(parameter.shape, generator=draw, dtype=torch.float64) + 0.5
        for name, parameter in module.named_parameters()
    }
    x = torch.randn(width, generator=draw, dtype=torch.float64) + 1
    try:
        scale, shift = affine(module, made_up, width)
        small = (_ask(module, made_up, _SMALL * _unit(width)) - shift) * _unit(width)
        answer = _ask(module, made_up, x)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise UnknownNorm(f"its norm {type(module).__name__} has weights of its own kind") from error
    eps = float(f"{_SMALL**2 * max(((scale / small) ** 2).mean().item() - 1, 0):.3g}")
    for centered in (False, True):
        moved = x - x.mean() if centered else x
        expected = scale * moved / (moved.square().mean() + eps).sqrt() + shift
        if torch.allclose(answer, expected, rtol=1e-4, atol=1e-5):
            return centered, bool(shift.abs().max() > 1e-3), eps
    raise UnknownNorm(f"its norm {type(module).__name__} is neither RMSNorm nor LayerNorm")


@torch.no_grad()
def affine(module: nn.Module, parameters: Mapping[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Scale and shift (float64, `width` each) of a norm with these parameters, norm(x) = scale ⊙ x̂ + shift."""
    wide = {name: tensor.double() for name, tensor in parameters.items()}
    unit = _unit(width)
    shift = _ask(module, wide, 0 * unit)
    return (_ask(module, wide, _LARGE * unit) - shift) * unit, shift


def _ask(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    device = next((tensor.device for tensor in parameters.values()), x.device)
    return functional_call(module, dict(parameters), (x.to(device)[None, None],))[0, 0].double().cpu()


def _unit(width: int) -> Tensor:
    """An input of mean 0 and mean square 1: 1, −1, 1, −1, …"""
    return torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(math.ceil(width / 2))[:width]
