"""What is minimised: the losses of a batch, and their sum."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershare.errors import LayershareError
from layershare.healing.distill import (
    StoredLogits,
    cross_entropy,
    hidden_distance,
    kl_divergence,
    top_k_divergence,
)
from layershare.healing.settings import Loss
from layershare.model.arch import find_blocks


class Objective:
    """The loss of a batch, and its parts by name: (1 − α)·CE + α·KD + hidden weight · hidden distance.

    The teacher is a model, or its logits on disk, or `None` if there is none in the loss.
    """

    def __init__(self, loss: Loss, student: PreTrainedModel, teacher: PreTrainedModel | StoredLogits | None) -> None:
        self.loss, self.student, self.teacher = loss, student, teacher

    def __call__(self, model: nn.Module, tokens: Tensor, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the predictions for tokens [b, t], the `rows` [b] of the text.

        `model` is the student, with all that is wrapped around it.
        """
        of_ce, of_kd = self.loss.weights
        asked: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
        states: list[list[Tensor]] = [[], []]
        theirs: Any = None
        if isinstance(self.teacher, PreTrainedModel) and self.loss.teaches:
            with torch.no_grad(), self._kept(self.teacher, states[1]):
                theirs = self.teacher(**asked)
        with self._kept(self.student, states[0]):
            ours: Any = model(**asked)
        parts = {}
        if of_ce:
            parts["ce"] = cross_entropy(ours.logits, tokens)
        if of_kd and isinstance(self.teacher, StoredLogits):
            parts["kd"] = top_k_divergence(ours.logits, *self.teacher.rows(rows), self.loss.temperature)
        elif of_kd:
            parts["kd"] = kl_divergence(ours.logits, theirs.logits, self.loss.temperature)
        if self.loss.hidden:
            if [each.shape for each in states[0]] != [each.shape for each in states[1]]:
                raise LayershareError(
                    "The teacher has other hidden states than this model, more or wider ones: set loss.hidden to 0."
                )
            parts["hidden"] = hidden_distance(*states)
        weights = {"ce": of_ce, "kd": of_kd, "hidden": self.loss.hidden}
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum(), parts

    @contextmanager
    def _kept(self, model: PreTrainedModel, states: list[Tensor]) -> Iterator[None]:
        """Put what leaves each block of a model into a list, if the loss wants it."""

        def keep(block: nn.Module, args: Any, output: Any) -> None:
            states.append(output if isinstance(output, Tensor) else output[0])

        blocks = find_blocks(model)[1] if self.loss.hidden else []
        hooks = [block.register_forward_hook(keep) for block in blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
