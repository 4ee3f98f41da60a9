"""Tiny compressed models with random factors, shared by the tests of this folder."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layershare.model.hub import LayershareConfig, LayershareQuantizer
from layershare.model.layers import ComposedLinear
from layershare.model.swap import Anchored, Group
from tests.families import tiny_model, tokens

RANK = 6


def some_groups(model: PreTrainedModel) -> list[Group]:
    """Groups over linears of the 4 blocks: both sides, members that are not neighbours, and some layers left dense.

    Of every third linear of a block from the first, layers 0 and 2 share the input side, 1 and 3 the output side; from
    the second, layers 0 to 2 share the output side and layer 3 stays dense.
    """
    groups = []
    for index, (role, layers) in enumerate(_by_role(model).items()):
        if index % 3 == 0:
            groups.append(Group(role, "input", RANK, layers[::2]))
            groups.append(Group(role, "output", RANK, layers[1::2]))
        elif index % 3 == 1:
            groups.append(Group(role, "output", RANK, layers[:3]))
    return groups


def some_deltas(model: PreTrainedModel) -> list[Anchored]:
    """In the others layers 1 and 3 have deltas: to layer 0, or, every second time, to a mean of the two."""
    deltas = []
    for index, (role, layers) in enumerate(_by_role(model).items()):
        if index % 3 == 2:
            deltas.append(Anchored(role, RANK, layers[index % 2], layers[1::2]))
    return deltas


def _by_role(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Name in a block -> the names of that linear in the 4 blocks, in the order of the first block."""
    linears = [n for n, m in model.base_model.named_modules() if isinstance(m, nn.Linear | Conv1D) and ".0." in n]
    return {
        name.partition(".0.")[2]: tuple(name.replace(".0.", f".{layer}.") for layer in range(4)) for name in linears
    }


def adopt(model: PreTrainedModel, config: LayershareConfig) -> PreTrainedModel:
    """Swap a live dense model's modules and make it look like a compressed one that was loaded, nothing filled."""
    quantizer = LayershareQuantizer(config)
    quantizer.preprocess_model(model)
    vars(model).update(hf_quantizer=quantizer, is_quantized=False)
    model.config.quantization_config = config
    return model


def compressed(family: str, **options) -> Any:
    """A live compressed model of the family, with random factors and deltas and with notes in its config."""
    model = tiny_model(family, **options)
    notes = {"method": "random", "keep": 0.5}
    adopt(model, LayershareConfig(some_groups(model), notes, deltas=some_deltas(model)))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ComposedLinear):
                for part in module.children():
                    part.weight.normal_(std=0.15)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """`[2, 12, vocabulary]`, for tokens that are the same in every test."""
    return model(tokens()).logits
