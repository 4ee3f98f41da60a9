"""Modes that a model is in for a while: evaluating, and generating without settings of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import GenerationConfig, PreTrainedModel


@contextmanager
def evaluating(block: nn.Module) -> Iterator[None]:
    """Put a block or model into eval mode and every module of it back into its own mode afterwards."""
    modes = [(module, module.training) for module in block.modules()]
    block.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def greedy(model: PreTrainedModel) -> Iterator[None]:
    """Have a model, in eval mode, generate the likeliest tokens, without settings of its own but what ends a text."""
    own = model.generation_config
    assert own is not None
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, bos_token_id=own.bos_token_id)
    try:
        with evaluating(model):
            yield
    finally:
        model.generation_config = own
