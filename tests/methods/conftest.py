from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from layershare.calibrate.stats import STREAMED, calibrate
from layershare.calibrate.text import load_text
from layershare.model.describe import describe
from layershare.model.weights import Weights
from layershare.plan.evidence import Evidence


@pytest.fixture
def evidence(tokenizer, words, tmp_path) -> Callable[[PreTrainedModel], Evidence]:
    """Measures a model on 24 blocks of 32 tokens."""

    def measure(model: PreTrainedModel) -> Evidence:
        spec, weights = describe(model), Weights.of(model)
        text = load_text(words, tokenizer, split="train", blocks=24, length=32)
        stats = calibrate(weights, spec, text, tmp_path / "stats", batch_size=8, kinds=STREAMED)
        return Evidence(spec, weights, stats, text)

    return measure
