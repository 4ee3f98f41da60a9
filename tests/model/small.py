"""Tiny compressed models with random factors, shared by the tests of this folder."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layershare.model import hub
from layershare.model.composition import Composition, Member, deltas, shared
from layershare.model.hub import LayershareConfig, LayershareQuantizer
from layershare.model.layers import ComposedLinear
from layershare.model.swap import member_of
from tests.families import tiny_model, tokens

RANK = 6


def some_shares(model: PreTrainedModel) -> list[Composition]:
    """Shared bases over linears of the 4 blocks: both sides, members that are not neighbours, some layers left dense.

    Of every third linear of a block from the first, layers 0 and 2 share the input side, 1 and 3 the output side; from
    the second, layers 0 to 2 share the output side and layer 3 stays dense. Some bases are pivoted, and some layers
    have private directions.
    """
    found = []
    for index, layers in enumerate(_by_role(model)):
        if index % 3 == 0:
            found.append(shared(layers[::2], RANK, "input", private_rank=2, pivot=True))
            found.append(shared(layers[1::2], RANK, "output"))
        elif index % 3 == 1:
            found.append(shared(layers[:3], RANK, "output", private_rank=3 * (index % 2), pivot=index % 2 == 1))
    return found


def some_deltas(model: PreTrainedModel) -> list[Composition]:
    """In the others layers 1 and 3 have deltas: to layer 0, or, every second time, to a mean of the two."""
    found = []
    for index, layers in enumerate(_by_role(model)):
        if index % 3 == 2:
            users = layers[1::2] if index % 2 else (layers[0], *layers[1::2])
            found.append(deltas(users, RANK, [layer.name for layer in layers[1::2]]))
    return found


def _by_role(model: PreTrainedModel) -> list[tuple[Member, ...]]:
    """Of every linear of a block those of the 4 blocks, in the order of the first block."""
    linears = {n: m for n, m in model.base_model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    first = [name for name in linears if ".0." in name]
    layers = ([name.replace(".0.", f".{layer}.") for layer in range(4)] for name in first)
    return [tuple(member_of(name, linears[name]) for name in names) for names in layers]


def adopt(model: PreTrainedModel, config: LayershareConfig) -> PreTrainedModel:
    """Swap a live dense model's modules and make it look like a compressed one that was loaded, nothing filled."""
    LayershareQuantizer(config).preprocess_model(model)
    hub.adopt(model, config)
    return model


def compressed(family: str, **options) -> Any:
    """A live compressed model of the family, with random factors and deltas and with notes in its config."""
    model = tiny_model(family, **options)
    notes = {"method": "random", "keep": 0.5}
    return filled(adopt(model, LayershareConfig([*some_shares(model), *some_deltas(model)], notes)))


@torch.no_grad()
def filled(model: Any) -> Any:
    """The model, its factors random."""
    for module in model.modules():
        if isinstance(module, ComposedLinear):
            for part in module.children():
                part.weight.normal_(std=0.15)  # pyright: ignore[reportCallIssue, reportArgumentType]
            for order in module.buffers(recurse=False):
                order.copy_(torch.randperm(len(order)))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """`[2, 12, vocabulary]`, for tokens that are the same in every test."""
    return model(tokens()).logits
