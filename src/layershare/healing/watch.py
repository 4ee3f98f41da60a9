"""What is told and measured while a model trains."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from layershare.errors import LayershareError
from layershare.healing.distill import cross_entropy, kl_divergence
from layershare.healing.trainer import WHOLE, HealTrainer
from layershare.model.modes import evaluating
from layershare.progress import Progress, Say
from layershare.units import duration

_TIMED = 5
"""Steps after which the time that is left is told; the first one, which compiles, is not counted."""


class Watch(TrainerCallback):
    """Reports progress, tells how it goes, keeps what is best on held-out blocks, and marks whole checkpoints.

    Best is what is nearest to the `teacher` there, if one is given, and what predicts the text best otherwise.
    """

    def __init__(
        self,
        trainer: HealTrainer,
        held_out: Tensor,
        every: int,
        rows: int,
        progress: Progress,
        say: Say,
        teacher: PreTrainedModel | None = None,
    ) -> None:
        self.trainer, self.held_out, self.every, self.rows = trainer, held_out, every, rows
        self.progress, self.say, self.teacher = progress, say, teacher
        self._clock: list[float] = []
        size = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
        self.tokens = size * held_out.shape[1]
        self.speed = 0.0
        """Tokens per second, of all steps but the first."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Measure before the first step."""
        self.first = state.global_step
        self.progress(state.global_step, state.max_steps)
        if state.global_step == 0:
            self._measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Tell speed and time left after some steps; measure every so many."""
        self.progress(state.global_step, state.max_steps)
        self._clock.append(time.perf_counter())
        if len(self._clock) == _TIMED + 1:
            speed = self.tokens * _TIMED / (self._clock[-1] - self._clock[0])
            left = (state.max_steps - state.global_step) * self.tokens / speed
            self.say(f"{speed:,.0f} tokens per second: about {duration(left)} to go.")
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            began = time.perf_counter()
            self._measure(state)
            self._clock = [each + time.perf_counter() - began for each in self._clock]  # it does not count as training

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Note the speed."""
        if len(self._clock) > 1:
            self.speed = self.tokens * (len(self._clock) - 1) / (self._clock[-1] - self._clock[0])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Tell the loss."""
        if logs and "loss" in logs:
            self.say(f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.4f}")

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Mark the checkpoint as whole."""
        if args.should_save:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()

    def _measure(self, state: Any) -> None:
        with self.trainer.accelerator.autocast():
            losses = held_out_losses(
                self.trainer.model_wrapped, self.teacher, self.held_out, self.rows, self.trainer.args.device
            )
        nll = losses[0]
        if not math.isfinite(nll):
            if state.global_step == 0:
                raise LayershareError(
                    "The loss on held-out blocks is not a number even before training; set precision=float32, or "
                    "compress the model anew."
                )
            raise self.trainer.diverged(f"after step {state.global_step}")
        perplexity, length = math.exp(min(nll, 700)), self.held_out.shape[1]
        measured = dict(zip(("held_out_loss", "held_out_kl"), losses, strict=False))
        state.log_history.append({**measured, "held_out_perplexity": perplexity, "step": state.global_step})
        if 0 < best(state.log_history)["step"] == state.global_step:
            self.trainer.keep_as_best()
        self.say(
            f"step {state.global_step} of {state.max_steps}: held-out perplexity {perplexity:.4g}, blocks of {length:,}"
        )


def best(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry of a log with the least held-out divergence, or else loss, the first one of several."""
    measured = [entry for entry in log if "held_out_loss" in entry]
    return min(measured, key=lambda entry: entry.get("held_out_kl", entry["held_out_loss"]))


def held_out_loss(model: Any, tokens: Tensor, rows: int, device: torch.device) -> float:
    """Mean negative log-likelihood, in nats per token, of blocks [n, length], so many at once."""
    return held_out_losses(model, None, tokens, rows, device)[0]


@torch.no_grad()
def held_out_losses(
    model: Any, teacher: PreTrainedModel | None, tokens: Tensor, rows: int, device: torch.device
) -> list[float]:
    """The same, and mean KL(teacher ‖ model) if there is a teacher."""
    sums = []
    with evaluating(model):
        for batch in tokens.to(device).split(rows):
            ours = model(input_ids=batch, use_cache=False).logits
            losses = [cross_entropy(ours, batch)]
            if teacher is not None:
                losses.append(kl_divergence(ours, teacher(input_ids=batch, use_cache=False).logits))
            sums.append(len(batch) * torch.stack(losses))
    return (torch.stack(sums).double().sum(0) / len(tokens)).tolist()
