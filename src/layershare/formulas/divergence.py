"""How far one distribution over the vocabulary is from another."""

import torch
from torch import Tensor


def divergence(original: Tensor, model: Tensor) -> float:
    """Σ D(original ‖ model) in nats of log-probabilities [positions, vocabulary], summed over positions in float64."""
    return float(original.exp().mul_(original - model).sum(dtype=torch.float64))
