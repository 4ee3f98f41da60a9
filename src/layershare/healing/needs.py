"""What a healing will need of the machine, before it starts."""

from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from layershare.healing.settings import Healing
from layershare.model.arch import find_blocks
from layershare.model.layers import ComposedLinear
from layershare.units import count, size

_STATES = {"sgd": 0, "adafactor": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}
"""Optimizer states in float32 per trained parameter, by the beginning of its name; Adam and others have two."""


@dataclass(frozen=True)
class HealNeeds:
    """Counts, and bytes of memory in one process: what is held (weights, with the copies that are multiplied in a
    narrower precision; gradients; optimizer states; teacher) exactly, what a backward pass needs (activations) roughly.

    `accumulates`: gradients wait for further micro-batches, instead of taking the place of the activations.
    """

    trained: int
    parameters: int
    tokens: int
    steps: int
    weights: int
    gradients: int
    states: int
    teacher: int
    activations: int
    accumulates: bool

    @property
    def memory(self) -> int:
        """What is needed at the highest point."""
        passing = self.gradients + self.activations if self.accumulates else max(self.gradients, self.activations)
        return self.weights + self.states + self.teacher + passing

    def sentence(self) -> str:
        """The needs in words."""
        parts = [f"{size(self.weights)} weights", f"{size(self.gradients)} gradients", f"{size(self.states)} optimizer"]
        parts += [f"{size(self.teacher)} teacher"] if self.teacher else []
        together = "" if self.accumulates else ", not at the same time as gradients"
        return (
            f"Trains {count(self.trained)} of {count(self.parameters)} parameters on {count(self.tokens)} tokens in "
            f"{self.steps:,} steps; needs about {size(self.memory)} of memory "
            f"({', '.join(parts)}, {size(self.activations)} activations{together})."
        )


def estimate(
    model: PreTrainedModel, healing: Healing, steps: int, rows: int, length: int, teacher: int, accumulates: bool
) -> HealNeeds:
    """The needs of training a model, adapters and all, with a teacher of so many bytes, `rows` blocks at once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained, whole = sum(number for number, trains in sizes if trains), sum(number for number, _ in sizes)
    states = next((n for name, n in _STATES.items() if healing.optimizer.name.startswith(name)), 2)
    return HealNeeds(
        trained=trained,
        parameters=whole,
        tokens=steps * healing.batch_size * length,
        steps=steps,
        weights=(4 + _copied(healing)) * whole,
        gradients=4 * trained,
        states=4 * states * trained,
        teacher=teacher,
        activations=rows * length * _activations(model, healing),
        accumulates=accumulates,
    )


def _copied(healing: Healing) -> int:
    """Bytes per number of the copies that autocast makes, of weights and of what linears read."""
    return 2 if healing.precision == "bfloat16" else 0


def _activations(model: PreTrainedModel, healing: Healing) -> int:
    """Bytes per token that a backward pass needs.

    Of each block, from the first one behind something that trains, what its linears write, what those that train read,
    and norms and the residual stream in float32; with checkpointing, of one block, and what each block reads. The
    logits, in float32 with their gradient, and as the head and the teacher make them.
    """
    base: Any = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    _, blocks = find_blocks(base)
    if not any(parameter.requires_grad for parameter in base.get_input_embeddings().parameters()):
        blocks = list(dropwhile(lambda block: not any(p.requires_grad for p in block.parameters()), blocks))
    each = _copied(healing) or 4
    per_block = [0]
    for block in blocks:
        matrices = [(name, m) for name, m in block.named_parameters() if m.dim() == 2]
        added = ("lora_B", *_added(block))
        written = sum(m.shape[0] for name, m in matrices if not any(each in name for each in added))
        read = sum(m.shape[1] for _, m in matrices if m.requires_grad)
        per_block.append(each * (written + read))
    width = 4 * model.config.hidden_size
    if healing.gradient_checkpointing:
        kept = max(per_block) + 4 * width + width * len(blocks)
    else:
        kept = sum(per_block) + 4 * width * len(blocks)
    return kept + model.config.vocab_size * (8 + each * (1 + healing.loss.teaches))


def _added(block: nn.Module) -> list[str]:
    """The linears of a block whose outputs are added to another's at once, so that nothing keeps them."""
    composed = {name: module for name, module in block.named_modules() if isinstance(module, ComposedLinear)}
    return [f"{name}.{term.factors[-1].name}." for name, module in composed.items() for term in module.terms[1:]]
