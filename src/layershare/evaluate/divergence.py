"""How far a compressed model is from its original: perplexity flatters, these do not.

KL divergence D(original ‖ model) and top-1 agreement (how often both rank the same token first), averaged over the same
positions as perplexity.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from layershare.calibrate.text import Text
from layershare.errors import LayershareError
from layershare.evaluate.perplexity import Perplexity, logits, negative_log_likelihood, perplexity
from layershare.formulas.divergence import divergence
from layershare.model.modes import evaluating
from layershare.model.weights import require_finite
from layershare.progress import Progress, no_progress


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a text measures; the last three only where an original is given.

    `kl` in nats per token, `top1_agreement` a fraction; `text` and `dtype` say what was measured in which precision.
    """

    text: dict[str, Any]
    dtype: str
    perplexity: Perplexity
    original_perplexity: Perplexity | None = None
    kl: float | None = None
    top1_agreement: float | None = None

    def __str__(self) -> str:
        """For people: what was measured on which text, one number a line."""
        text = self.text
        blocks = f"{text['blocks']:,} blocks of {text['length']:,} tokens of {text['source']}, {self.dtype}"
        if self.original_perplexity is None:
            return f"perplexity {self.perplexity.value:.4g} on {blocks}"
        return (
            f"perplexity {self.perplexity.value:.4g} (original: {self.original_perplexity.value:.4g}) on {blocks}\n"
            f"KL divergence from the original: {self.kl:.4g} nats per token\n"
            f"top-1 agreement with the original: {self.top1_agreement:.1%}"
        )


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    text: Text,
    original: PreTrainedModel | None = None,
    *,
    batch_size: int = 1,
    progress: Progress = no_progress,
) -> Evaluation:
    """Measure a model on a text, and against its original if that is given.

    Raises `LayershareError` if the two have different vocabularies, or if one gives no numbers.
    """
    if original is not None and original.config.vocab_size != model.config.vocab_size:
        raise LayershareError(
            f"The models have different vocabularies ({model.config.vocab_size} and {original.config.vocab_size} "
            "tokens), so they cannot be compared."
        )
    nll = reference_nll = kl = agreement = 0.0
    batches = text.tokens.split(batch_size)
    with evaluating(model), evaluating(model if original is None else original):
        for done, tokens in enumerate(batches):
            progress(done, len(batches))
            ours = logits(model, tokens)
            theirs = None if original is None else logits(original, tokens).to(ours.device)
            for row, block in enumerate(tokens.to(ours.device)):  # float32 for one block at a time
                p = torch.log_softmax(ours[row].float(), dim=-1)
                nll += negative_log_likelihood(p, block)
                if theirs is not None:
                    q = torch.log_softmax(theirs[row].float(), dim=-1)
                    reference_nll += negative_log_likelihood(q, block)
                    agreement += int((p.argmax(-1) == q.argmax(-1)).sum())
                    kl += divergence(q, p)
    progress(len(batches), len(batches))
    _require_numbers(model, nll)
    if original is not None:
        _require_numbers(original, reference_nll)
    predicted = text.tokens.shape[0] * (text.tokens.shape[1] - 1)
    measured = Evaluation(text.identity, str(model.dtype).removeprefix("torch."), perplexity(nll, predicted))
    if original is None:
        return measured
    return Evaluation(
        measured.text,
        measured.dtype,
        measured.perplexity,
        perplexity(reference_nll, predicted),
        kl / predicted,
        agreement / predicted,
    )


def _require_numbers(model: PreTrainedModel, nll: float) -> None:
    """Raise `LayershareError` if a likelihood is none, naming the tensor at fault if there is one."""
    if math.isfinite(nll):
        return
    require_finite((*model.named_parameters(), *model.named_buffers()))
    if math.isnan(nll):
        raise LayershareError(f"The logits overflow in {str(model.dtype).removeprefix('torch.')}; use a wider dtype.")
