"""Tiny compressed models with random factors, shared by the tests of this folder."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layershare.model.hub import LayershareConfig, LayershareQuantizer
from layershare.model.layers import FactorLinear
from layershare.model.swap import Group
from tests.families import tiny_model, tokens

RANK = 6


def some_groups(model: PreTrainedModel) -> list[Group]:
    """Groups over all linears of the 4 blocks: both sides, members that are not neighbours, and some layers left dense.

    Of every first linear of a block, layers 0 and 2 share the input side, 1 and 3 the output side; of every second,
    layers 0 to 2 share the output side and layer 3 stays dense.
    """
    linears = [n for n, m in model.base_model.named_modules() if isinstance(m, nn.Linear | Conv1D) and ".0." in n]
    groups = []
    for index, name in enumerate(linears):
        role = name.rpartition(".")[2]
        layers = [name.replace(".0.", f".{layer}.") for layer in range(4)]
        if index % 2:
            groups.append(Group(role, "output", RANK, tuple(layers[:3])))
        else:
            groups.append(Group(role, "input", RANK, tuple(layers[::2])))
            groups.append(Group(role, "output", RANK, tuple(layers[1::2])))
    return groups


def adopt(model: PreTrainedModel, config: LayershareConfig) -> PreTrainedModel:
    """Swap a live dense model's modules and make it look like a compressed one that was loaded, factors not filled."""
    quantizer = LayershareQuantizer(config)
    quantizer.preprocess_model(model)
    vars(model).update(hf_quantizer=quantizer, is_quantized=False)
    model.config.quantization_config = config
    return model


def compressed(family: str, **options) -> Any:
    """A live compressed model of the family, with random factors and notes in its config."""
    model = tiny_model(family, **options)
    adopt(model, LayershareConfig(some_groups(model), {"method": "random", "keep": 0.5}))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FactorLinear):
                for factor in module.children():
                    factor.weight.normal_(std=0.15)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """`[2, 12, vocabulary]`, for tokens that are the same in every test."""
    return model(tokens()).logits
