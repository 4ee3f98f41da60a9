"""Perplexity, one definition: exp of the mean negative log-likelihood of all predicted tokens.

Blocks do not overlap, each is a context of its own, and its first token is not predicted. The average runs over tokens,
not over blocks, and what does not fill a block is left out (see `calibrate/text.py`).
"""

import math
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Perplexity:
    """`value` = exp(`nll`), `nll` the mean over `tokens` predicted tokens, in nats."""

    value: float
    nll: float
    tokens: int


def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits [rows, length - 1, vocabulary] for the tokens after the first of each block."""
    return model(input_ids=tokens.to(model.device), use_cache=False).logits[:, :-1]


def negative_log_likelihood(log_probs: Tensor, block: Tensor) -> float:
    """Sum over the predicted tokens of one block, in nats: log-probabilities [length - 1, vocabulary], ids [length]."""
    return -float(log_probs.gather(-1, block[1:, None]).double().sum())


def perplexity(nll_sum: float, tokens: int) -> Perplexity:
    """Perplexity from the summed negative log-likelihood of a number of tokens."""
    nll = nll_sum / tokens
    return Perplexity(math.exp(nll) if nll < 700 else math.inf, nll, tokens)
