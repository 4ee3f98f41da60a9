"""Perplexity, one definition: exp of the mean negative log-likelihood of all predicted tokens.

Blocks do not overlap, each is a context of its own, and its first token is not predicted. The average runs over tokens,
not over blocks, and what does not fill a block is left out (see `calibrate/text.py`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Perplexity:
    """`value` = exp(`nll`), `nll` the mean over `tokens` predicted tokens, in nats."""

    value: float
    nll: float
    tokens: int


def log_probabilities(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Log-probabilities, float32 [rows, length - 1, vocabulary], for the tokens after the first of each block."""
    logits = model(input_ids=tokens.to(model.device), use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def negative_log_likelihood(log_probs: Tensor, tokens: Tensor) -> float:
    """Sum over the predicted tokens of a batch, in nats."""
    picked = log_probs.gather(-1, tokens[:, 1:, None].to(log_probs.device))
    return -float(picked.double().sum())


def perplexity(nll_sum: float, tokens: int) -> Perplexity:
    """Perplexity from the summed negative log-likelihood of a number of tokens."""
    nll = nll_sum / tokens
    return Perplexity(math.exp(nll) if nll < 700 else math.inf, nll, tokens)
