"""How fast a model reads and writes, measured against its original where that is given.

Prefill is the time until the first new token is known, decode the time per token after it; both are taken inside
`generate`, greedy, with its cache, at batch 1 and at a larger one, since a model can win one and lose the other. The
models take turns, and who begins changes every round, so that whatever else the machine does meets all of them alike.
Figures are medians over the rounds, ratios medians of the rounds' own ratios.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from layershare.errors import LayershareError
from layershare.evaluate.generate import require_context
from layershare.model.modes import evaluating
from layershare.progress import Progress, no_progress

WARM_UP = 1
"""Rounds that are run and not counted."""


@dataclass(frozen=True)
class Rate:
    """Tokens per second at one batch size, all rows together; `ratio` is how many times the original's."""

    phase: str
    batch: int
    model: float
    original: float | None = None
    ratio: float | None = None


@torch.no_grad()
def measure_speed(
    model: PreTrainedModel,
    original: PreTrainedModel | None = None,
    *,
    batches: tuple[int, ...] = (1, 8),
    prompt: int = 128,
    new: int = 32,
    rounds: int = 5,
    progress: Progress = no_progress,
) -> list[Rate]:
    """Tokens per second of prefill (of `prompt` tokens) and of decode (of `new` further ones), per batch size.

    Prompts are random tokens, the same for both models. Raises `LayershareError` if there are fewer than two tokens to
    decode, or if prompt and new tokens do not fit into a model's context.
    """
    models = {"model": model} if original is None else {"model": model, "original": original}
    if new < 2 or prompt < 1 or rounds < 1:
        raise LayershareError("Measuring speed takes a prompt, two new tokens and one round at least.")
    for each in models.values():
        require_context(each, prompt, new)
    vocabulary = min(each.config.vocab_size for each in models.values())
    generator = torch.Generator().manual_seed(0)
    steps, total = 0, len(batches) * (WARM_UP + rounds)
    rates = []
    for batch in batches:
        prompts = torch.randint(vocabulary, (batch, prompt), generator=generator)
        measured = []
        for turn in range(WARM_UP + rounds):
            progress(steps, total)
            steps += 1
            seconds = _round(models if turn % 2 else dict(reversed(models.items())), prompts, new)
            if turn >= WARM_UP:
                measured.append(seconds)
        for phase, tokens in (("prefill", prompt), ("decode", new - 1)):
            rates.append(_rate(phase, batch, batch * tokens, [{m: t[phase] for m, t in s.items()} for s in measured]))
    progress(total, total)
    return rates


def _round(models: Mapping[str, PreTrainedModel], prompts: Tensor, new: int) -> dict[str, dict[str, float]]:
    """Seconds of each phase by model, each model once."""
    return {name: _time(model, prompts.to(model.device), new) for name, model in models.items()}


def _time(model: PreTrainedModel, prompts: Tensor, new: int) -> dict[str, float]:
    clock = _Stopwatch()
    with evaluating(model):
        model.generate(  # pyright: ignore[reportCallIssue]
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
            do_sample=False,
            logits_processor=[clock],
        )
    begin, first, *_, last = clock.times
    return {"prefill": first - begin, "decode": last - first}


def _rate(phase: str, batch: int, tokens: int, seconds: list[dict[str, float]]) -> Rate:
    """Medians over the rounds' seconds by model."""
    ours = tokens / median(each["model"] for each in seconds)
    if "original" not in seconds[0]:
        return Rate(phase, batch, ours)
    theirs = tokens / median(each["original"] for each in seconds)
    return Rate(phase, batch, ours, theirs, median(each["original"] / each["model"] for each in seconds))


class _Stopwatch(LogitsProcessor):
    """Notes when it is made and when the logits of each new token are there."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[0, 0].item()  # waits for an accelerator
        self.times.append(time.perf_counter())
        return scores
