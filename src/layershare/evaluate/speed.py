"""How fast a model reads and writes, measured against its original where that is given.

Prefill is the time until the first new token is known, decode the time per token after it, at batch 1 and at a larger
one, since a model can win one and lose the other. Who knows how to run a model takes the time, transformers' `generate`
here, vLLM in `serve.speed`. The models take turns, and who begins changes every round, so that whatever else the
machine does meets all of them alike. Figures are medians over the rounds, ratios medians of the rounds' own ratios.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedModel

from layershare.errors import LayershareError
from layershare.model.modes import greedy
from layershare.progress import Progress, no_progress

WARM_UP = 1
"""Rounds that are run and not counted."""
Timer: TypeAlias = Callable[[Tensor, int], Mapping[str, float]]
"""Seconds by phase that a model takes to read prompts `[rows, tokens]` and to add that many tokens to each."""


@dataclass(frozen=True)
class Workload:
    """What is measured: `prompt` random tokens are read and `new` ones written, `rounds` times at each batch size.

    Raises `LayershareError` if there are fewer than two tokens to decode.
    """

    batches: tuple[int, ...] = (1, 8)
    prompt: int = 128
    new: int = 32
    rounds: int = 5

    def __post_init__(self) -> None:
        if self.new < 2 or self.prompt < 1 or self.rounds < 1:
            raise LayershareError("Measuring speed takes a prompt, two new tokens and one round at least.")


@dataclass(frozen=True)
class Rate:
    """Tokens per second at one batch size, all rows together; `ratio` is how many times the original's.

    `latency`: seconds until the first token is there (prefill) or from one to the next (decode).
    """

    phase: str
    batch: int
    model: float
    latency: float
    original: float | None = None
    original_latency: float | None = None
    ratio: float | None = None


def measure_speed(
    timers: Sequence[Timer], workload: Workload, vocabulary: int, progress: Progress = no_progress
) -> list[Rate]:
    """Tokens per second of prefill and of decode, per batch size, of a model and, if it is given, its original.

    Prompts are random tokens below `vocabulary`, the same for both.
    """
    models = dict(zip(("model", "original"), timers, strict=False))
    prompt, new = workload.prompt, workload.new
    generator = torch.Generator().manual_seed(0)
    steps, turns = 0, WARM_UP + workload.rounds
    total = len(workload.batches) * turns
    rates = []
    for batch in workload.batches:
        prompts = torch.randint(vocabulary, (batch, prompt), generator=generator)
        measured = []
        for turn in range(turns):
            progress(steps, total)
            steps += 1
            order = models if turn % 2 else reversed(models)
            seconds = {name: models[name](prompts, new) for name in order}
            if turn >= WARM_UP:
                measured.append(seconds)
        for phase, tokens, answers in (("prefill", prompt, 1), ("decode", new - 1, new - 1)):
            seconds = [{name: each[phase] for name, each in taken.items()} for taken in measured]
            rates.append(_rate(phase, batch, tokens, answers, seconds))
    progress(total, total)
    return rates


@torch.no_grad()
def generate_seconds(model: PreTrainedModel, prompts: Tensor, new: int) -> dict[str, float]:
    """What a `Timer` tells, of transformers' `generate`, greedy, with its cache."""
    clock, prompts = _Stopwatch(), prompts.to(model.device)
    with greedy(model):
        model.generate(  # pyright: ignore[reportCallIssue]
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
            logits_processor=[clock],
        )
    begin, first, *_, last = clock.times
    return {"prefill": first - begin, "decode": last - first}


def weight_bytes(model: nn.Module) -> int:
    """The memory that a model's parameters and buffers take, what several of them share counted once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _rate(phase: str, batch: int, tokens: int, steps: int, seconds: list[dict[str, float]]) -> Rate:
    """Medians over the rounds' seconds by model, in which each row had so many `tokens`, in so many `steps`."""
    ours = median(each["model"] for each in seconds)
    rate = Rate(phase, batch, batch * tokens / ours, ours / steps)
    if "original" not in seconds[0]:
        return rate
    theirs = median(each["original"] for each in seconds)
    ratio = median(each["original"] / each["model"] for each in seconds)
    return replace(rate, original=batch * tokens / theirs, original_latency=theirs / steps, ratio=ratio)


class _Stopwatch(LogitsProcessor):
    """Notes when it is made and when the logits of each new token are there."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[0, 0].item()  # waits for an accelerator
        self.times.append(time.perf_counter())
        return scores
