"""How far a compressed model is from its original on text that is held out, before there is a checkpoint of it."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from layershare.calibrate.backward import Head
from layershare.calibrate.drivers.calls import hidden_output, with_hidden_output
from layershare.calibrate.text import Text
from layershare.errors import NotFinite
from layershare.formulas.divergence import divergence
from layershare.model.modes import evaluating
from layershare.plan.evidence import Evidence
from layershare.progress import Progress
from layershare.solve.apply import Factored, compressed
from layershare.store import Store


class HeldOut:
    """Measures compressed models on the held-out text, each once: what was found survives in `store`, by label.

    The text passes through one block after another. Memory holds one block, the hidden states that the original's last
    block puts out, the output head and the logits of one block of text.
    """

    def __init__(self, store: Store, evidence: Evidence) -> None:
        self._store = store
        self._evidence = evidence

    @property
    def text(self) -> Text:
        """The held-out text."""
        return self._evidence.held_out

    @property
    def found(self) -> dict[str, float]:
        """Label -> what was found, so far."""
        return {label: self._store.facts(label)["kl"] for label in self._store}

    def divergence(self, label: str, made: Callable[[], Factored], progress: Progress) -> float:
        """KL(original ‖ compressed) in nats per token of what `made` gives, unless what has this label is known.

        Raises `NotFinite` if it is no number.
        """
        if label not in self._store:
            self._store.write(label, {}, {"kl": self._measure(made(), progress)})
        return self._store.facts(label)["kl"]

    @torch.no_grad()
    def _measure(self, factored: Factored, progress: Progress) -> float:
        states, head = self._original
        n_layers, total, predicted = factored.spec.n_layers, 0.0, 0
        stream = self._evidence.stream(self._evidence.held_out)
        batches = stream.batches
        for layer, block in stream:
            progress(layer, n_layers)
            with compressed(block, layer, factored), evaluating(block):
                if layer < n_layers - 1:
                    stream.run()
                    continue
                for batch in range(len(batches)):
                    args, kwargs = stream.call(batch)
                    tokens, output = batches.rows(batches.tokens, batch), block(*args, **kwargs)
                    wanted = batches.rows(states, batch).to(self._evidence.weights.device)
                    for row in range(len(tokens)):  # logits of one block of text at a time
                        q, p = (
                            _log_probabilities(head, tokens[row, None], with_hidden_output(output, leaving[row, None]))
                            for leaving in (wanted, hidden_output(output))
                        )
                        total += divergence(q, p)
                        predicted += len(p)
            break  # or the stream would run the last block, too, which is no longer as it was
        progress(n_layers, n_layers)
        if not math.isfinite(total):
            raise NotFinite("The logits overflow or contain NaN on held-out text; run the model in a wider dtype.")
        return total / predicted

    @cached_property
    def _original(self) -> tuple[Tensor, Head]:
        """The hidden states that the original's last block puts out, and what comes after it."""
        stream = self._evidence.stream(self._evidence.held_out)
        for _ in stream:
            stream.run()
        return stream.outputs, Head(self._evidence.weights)


def _log_probabilities(head: Head, tokens: Tensor, output: Any) -> Tensor:
    """log p(next token) [length − 1, vocabulary] of `tokens` [1, length], given what the last block returns."""
    return torch.log_softmax(head.logits(tokens, output)[0, :-1].float(), dim=-1)
