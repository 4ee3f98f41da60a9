"""The losses of healing."""

import torch
from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of each token after the first: logits [b, t, vocabulary], labels [b, t]."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(teacher ‖ student) at temperature T, mean over positions: logits [b, t, vocabulary]."""
    p = torch.log_softmax(teacher.float() / temperature, -1)
    q = torch.log_softmax(student.float() / temperature, -1)
    return temperature**2 * functional.kl_div(q, p, log_target=True, reduction="sum") / q[..., 0].numel()


def hidden_distance(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Mean over blocks of ‖s − t‖²/‖t‖²: hidden states [b, t, width] behind each block."""
    each = [
        (s.float() - t.float()).square().sum() / t.float().square().sum() for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(each).mean()
