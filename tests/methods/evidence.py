"""Evidence of tiny models, and weights with the spectra that a test wants."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from layershare.calibrate.stats import Statistic, calibrate
from layershare.calibrate.text import load_text
from layershare.model.describe import describe
from layershare.model.weights import Weights
from layershare.plan.evidence import Evidence


def unmeasured(model: PreTrainedModel) -> Evidence:
    """The weights alone."""
    return Evidence(describe(model), Weights.of(model))


def measured(model: PreTrainedModel, folder: Path, tokenizer, words: list[str], *kinds: Statistic) -> Evidence:
    """The model with statistics of these kinds, on 24 blocks of 32 tokens."""
    spec, weights = describe(model), Weights.of(model)
    text = load_text(words, tokenizer, split="train", blocks=24, length=32)
    return Evidence(spec, weights, calibrate(weights, spec, text, folder, batch_size=6, kinds=kinds), text)


@torch.no_grad()
def set_spectrum(model: PreTrainedModel, name: str, values: torch.Tensor) -> None:
    """Give a weight these singular values, falling."""
    weight = model.get_parameter(f"{name}.weight")
    u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    weight.copy_(u * values @ vh)
