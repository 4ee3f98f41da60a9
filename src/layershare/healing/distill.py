"""Losses of recovery training, and a teacher's logits on disk for a teacher that is not there while training.

Logits are widened to float32 a few positions at a time and once more in the backward pass, because with today's
vocabularies a float32 copy of a batch's logits is larger than many a model.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from layershare.calibrate.drivers.calls import with_hidden_output
from layershare.calibrate.stream import Stream
from layershare.disk import require_disk
from layershare.errors import LayershareError
from layershare.model.arch import find_blocks
from layershare.model.modes import evaluating
from layershare.model.weights import Weights
from layershare.progress import Progress, no_progress
from layershare.store import Store, only_one

_POSITIONS = 512
"""Positions that are widened to float32 at once."""
UNIT = 1 << 18
"""Tokens per file of stored logits: what a killed run computes again at most, and whose hidden states are kept."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of −log q(next token) in nats: logits [b, t, vocabulary], labels [b, t], of which −100 is left out."""
    targets = labels[:, 1:].to(logits.device)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(_wide(logits), targets, reduction="sum")

    return _sum(loss, logits[:, :-1].flatten(0, 1), targets.flatten()) / (targets != -100).sum()


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p ‖ q)·T², the mean over all positions, of p = softmax(teacher/T) and q = softmax(student/T).

    Logits are [b, t, vocabulary]. T² keeps the size of the gradients (Hinton et al., arXiv 1503.02531).
    """

    def loss(ours: Tensor, theirs: Tensor) -> Tensor:
        log_q = (_wide(ours) / temperature).log_softmax(-1)
        return functional.kl_div(log_q, (_wide(theirs) / temperature).softmax(-1), reduction="sum")

    pairs = student_logits.flatten(0, -2), teacher_logits.to(student_logits.device).flatten(0, -2)
    return _sum(loss, *pairs) * temperature**2 / len(pairs[0])


def top_k_divergence(student_logits: Tensor, ids: Tensor, logprobs: Tensor, temperature: float = 1.0) -> Tensor:
    """`kl_divergence` from the teacher's k likeliest tokens alone, all others taken together as one.

    student_logits [b, t, vocabulary]; `ids` and `logprobs` [b, t, k] as `StoredLogits.rows` gives them. Both
    distributions over k + 1 outcomes are taken at T = 1 and then softened by T. Never more than the full divergence at
    T = 1, and equal to it for k = vocabulary at any T.
    """
    every = ids.shape[-1] == student_logits.shape[-1]

    def loss(ours: Tensor, ids: Tensor, log_p: Tensor) -> Tensor:
        log_all = _wide(ours).log_softmax(-1)
        log_q, log_p = log_all.gather(-1, ids), log_p.to(log_all.dtype)
        if not every:
            rest_q = log_all.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
            rest_p = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=0).log()
            log_q, log_p = torch.cat([log_q, rest_q], -1), torch.cat([log_p, rest_p], -1)
        soft_q = (log_q / temperature).log_softmax(-1)
        return functional.kl_div(soft_q, (log_p / temperature).softmax(-1), reduction="sum")

    device = student_logits.device
    parts = student_logits.flatten(0, -2), ids.to(device).flatten(0, -2), logprobs.to(device).flatten(0, -2)
    return _sum(loss, *parts) * temperature**2 / len(parts[0])


def hidden_distance(student_states: Sequence[Tensor], teacher_states: Sequence[Tensor]) -> Tensor:
    """The mean over blocks of ‖s − t‖²/‖t‖², s and t the hidden states [b, t, width] that leave a block."""
    distances = []
    for ours, theirs in zip(student_states, teacher_states, strict=True):
        wide = _wide(theirs.to(ours.device))
        distances.append((_wide(ours) - wide).square().sum() / wide.square().sum())
    return torch.stack(distances).mean()


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _sum(loss: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The sum of a loss over positions, the first dimension of all tensors, a few of them at a time."""
    parts = zip(*(tensor.split(_POSITIONS) for tensor in tensors), strict=True)
    sums = [checkpoint(loss, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(cast(list[Tensor], sums)).sum()


class StoredLogits:
    """A teacher's k likeliest next tokens at every position of a text, in files: 8·k bytes per token.

    Made by `make`, read through memory maps.
    """

    def __init__(self, store: Store, units: Sequence[str]) -> None:
        self._ids = [store.read(unit, "ids") for unit in units]
        self._logprobs = [store.read(unit, "logprobs") for unit in units]

    @classmethod
    def make(
        cls,
        teacher: Weights,
        tokens: Tensor,
        folder: Path,
        k: int,
        batch_size: int,
        identity: Mapping[str, Any] | None = None,
        progress: Progress = no_progress,
        *,
        unit: int = UNIT,
    ) -> "StoredLogits":
        """Compute, in `folder`, what is not there yet for `tokens` [n, length], and open it all.

        The teacher may be on disk: it runs block by block, `batch_size` rows at a time, and for each file of about
        `unit` tokens anew. `k`: all tokens if the vocabulary is smaller. What is there counts if it was made with the
        same teacher, tokens, k and `identity` (whatever else matters to the caller). If another process is at work in
        the folder, waits for it. Raises `LayershareError` if the disk is too small or the teacher's logits are not
        finite.
        """
        n, length = tokens.shape
        rows = max(1, unit // length)
        k = min(k, teacher.model.config.vocab_size)
        identity = {
            **(identity or {}),
            "teacher": teacher.fingerprint,
            "tokens": hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest(),
            "shape": [n, length],
            "k": k,
            "rows": rows,
        }
        with only_one(folder, wait=True):
            store = Store(folder, identity)
            parts = {f"logits-{i:05d}": part for i, part in enumerate(tokens.split(rows))}
            missing = [name for name in parts if name not in store]
            require_disk({folder: sum(parts[name].numel() for name in missing) * k * 8})
            layers = len(teacher.blocks)
            for done, name in enumerate(missing):

                def step(layer: int, done: int = done) -> None:
                    progress(done * layers + layer, len(missing) * layers)

                store.write(name, _top_k(teacher, parts[name], k, batch_size, folder, step))
            progress(1, 1)
            return cls(store, list(parts))

    def rows(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (int64) and their log-probabilities (float32), both [b, length, k], of rows of the text.

        The likeliest token first; position i tells of the token after i.
        """
        each = len(self._ids[0])
        places = [divmod(int(index), each) for index in indices]
        ids = torch.stack([self._ids[unit][row] for unit, row in places])
        return ids.long(), torch.stack([self._logprobs[unit][row] for unit, row in places])


@torch.no_grad()
def _top_k(
    teacher: Weights, tokens: Tensor, k: int, batch_size: int, scratch: Path, step: Callable[[int], None]
) -> dict[str, Tensor]:
    """`ids` (int32) and `logprobs` (float32), both [n, length, k], for tokens [n, length]."""
    stream = Stream(teacher, tokens, batch_size, scratch)
    form = None
    for layer, block in stream:
        step(layer)
        if layer == len(teacher.blocks) - 1:
            args, kwargs = stream.call(0)
            with evaluating(block):
                form = with_hidden_output(block(*args, **kwargs), None)
    head = teacher.shell(head=True)
    n, length = tokens.shape
    found = {
        "ids": torch.empty(n, length, k, dtype=torch.int32),
        "logprobs": torch.empty(n, length, k, dtype=torch.float32),
    }
    for row in range(n):
        states = stream.outputs[row, None].to(teacher.device)
        logits = _after_blocks(head, tokens[row, None].to(teacher.device), with_hidden_output(form, states))
        if not logits.isfinite().all():
            raise LayershareError("The teacher's logits overflow or contain NaN; run it in a wider dtype.")
        for start in range(0, length, _POSITIONS):
            part = slice(start, start + _POSITIONS)
            best = logits[part].float().log_softmax(-1).topk(k)
            found["ids"][row, part], found["logprobs"][row, part] = best.indices, best.values
    return found


def _after_blocks(head: PreTrainedModel, tokens: Tensor, output: Any) -> Tensor:
    """Logits [length, vocabulary] of tokens [1, length]: the model's own forward, whose blocks answer with `output`."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        return output

    for block in find_blocks(head)[1]:
        block.forward = answer
    return head(input_ids=tokens, use_cache=False).logits[0]
