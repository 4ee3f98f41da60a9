"""What a healing will need of the machine, before it starts."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from layershare.healing.settings import Healing
from layershare.model.arch import find_blocks
from layershare.plan.table import size
from layershare.report.words import count

_STATES = {"sgd": 0, "adafactor": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}
"""Optimizer states in float32 per trained parameter, by the beginning of its name; Adam and others have two."""


@dataclass(frozen=True)
class HealNeeds:
    """Counts, and bytes of memory in one process: activations are a rough estimate, the others are exact."""

    trained: int
    parameters: int
    tokens: int
    steps: int
    weights: int
    gradients: int
    states: int
    teacher: int
    activations: int

    @property
    def memory(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.states + self.teacher + self.activations

    def sentence(self) -> str:
        """The needs in words."""
        parts = [f"{size(self.weights)} weights", f"{size(self.gradients + self.states)} gradients and optimizer"]
        parts += [f"{size(self.teacher)} teacher"] if self.teacher else []
        return (
            f"Trains {count(self.trained)} of {count(self.parameters)} parameters on {count(self.tokens)} tokens in "
            f"{self.steps:,} steps; needs about {size(self.memory)} of memory "
            f"({', '.join(parts)}, {size(self.activations)} activations)."
        )


def estimate(
    model: PreTrainedModel, healing: Healing, steps: int, rows: int, length: int, teacher: int, vocabulary: int
) -> HealNeeds:
    """The needs of training a model, adapters and all, with a teacher of so many bytes, `rows` blocks at once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(number for number, trains in sizes if trains)
    states = next((n for name, n in _STATES.items() if healing.optimizer.name.startswith(name)), 2)
    return HealNeeds(
        trained=trained,
        parameters=sum(number for number, _ in sizes),
        tokens=steps * healing.batch_size * length,
        steps=steps,
        weights=4 * sum(number for number, _ in sizes),
        gradients=4 * trained,
        states=4 * states * trained,
        teacher=teacher,
        activations=_activations(model, healing, rows * length, vocabulary),
    )


def _activations(model: PreTrainedModel, healing: Healing, tokens: int, vocabulary: int) -> int:
    """Bytes that a backward pass needs: per block what its linears read and write, and the logits a few times.

    With checkpointing it is one block, and what each block reads.
    """
    _, blocks = find_blocks(model if isinstance(model, PreTrainedModel) else model.get_base_model())
    each = 2 if healing.precision == "bfloat16" else 4
    per_block = []
    for block in blocks:
        shapes = [parameter.shape for parameter in block.parameters() if parameter.dim() == 2]
        per_block.append(each * sum(sum(shape) for shape in shapes))
    width = 4 * model.config.hidden_size
    if healing.gradient_checkpointing:
        kept = max(per_block) + width * len(blocks)
    else:
        kept = sum(per_block) + 4 * width * len(blocks)  # norms and the residual stream are in float32
    logits = 4 * vocabulary * (3 + 2 * healing.loss.teaches)
    return tokens * (kept + logits)
