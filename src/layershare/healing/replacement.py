"""Progressive module replacement: in training a gate per block chooses between the student's block and the original's.

A block is replaced with a probability p that rises from p₀ to 1, deeper blocks earlier; then a phase without gates
follows (DeltaLLM, arXiv 2501.18596; the gates are those of BERT-of-Theseus, arXiv 2002.02925). The paper tells neither
p₀ nor the rise nor how much earlier "later layers" are: linear, and these defaults, are our choice.

A gate is no module in the student's tree: it stands in the block's `forward`. So the names of parameters and tensors
are what they are without gates, and what works on the student works while it is gated: optimizers and checkpoints hold
the student's tensors alone (the original's blocks are nobody's children), the Trainer saves and resumes as usual, FSDP
and gradient checkpointing find the block's own class. Where a gate takes the original's block, the student's gets no
gradient in that step, so that DDP needs `find_unused_parameters`. A draw holds for a whole optimizer step, through
gradient accumulation and through the second forward of gradient checkpointing, and is the same on every process.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from random import Random
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from layershare.errors import LayershareError
from layershare.healing.settings import Replacement
from layershare.model.arch import find_blocks
from layershare.model.sliced import SlicedNorm

LOGGED = "replacement"
"""The name under which the mean probability is logged."""


class Gate:
    """Stands in the `forward` of a student's block, and calls it or the original's block.

    `open`: whether the student's block runs. A block in eval mode always runs, so what is measured is the student.
    `number` is the block's in the stack, `depth` as in `Replacement.probability`.
    """

    def __init__(self, block: nn.Module, original: nn.Module, number: int, depth: float, schedule: Replacement) -> None:
        self.number, self.depth, self.schedule = number, depth, schedule
        self.open = True
        self._block, self._original = block, original
        self._own = vars(block).get("forward")  # such as accelerate's hooks put there

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the chosen block makes of the arguments."""
        block = self._block
        if self.open or not block.training:
            # The class's forward at this moment: FSDP changes the class, gradient checkpointing looks for it.
            return self._own(*args, **kwargs) if self._own else type(block).forward(block, *args, **kwargs)
        if isinstance(block, GradientCheckpointingLayer) and block.gradient_checkpointing:
            return checkpoint(self._original, *args, use_reentrant=False, **kwargs)
        return self._original(*args, **kwargs)

    def probability(self, done: float) -> float:
        """The probability with which it is open when a part `done` ∈ [0, 1] of the training is over."""
        return self.schedule.probability(done, self.depth)

    @property
    def trains(self) -> bool:
        """Whether anything in the student's block is trained."""
        return any(parameter.requires_grad for parameter in self._block.parameters())

    def enter(self) -> None:
        """Take the place of the block's forward."""
        self._block.forward = self  # pyright: ignore[reportAttributeAccessIssue]  # not a method

    def leave(self) -> None:
        """Give the block back its forward."""
        if self._own is None:
            del self._block.forward
        else:
            self._block.forward = self._own


@contextmanager
def gates(student: PreTrainedModel, original: PreTrainedModel, schedule: Replacement) -> Iterator[list[Gate]]:
    """Put a gate before every block of the student that is not the original's, for the duration; all are open at first.

    `student` is the compressed model itself, before anything is wrapped around it. The original's blocks are put in
    eval mode and frozen; they must be where the student's are, and in its dtype unless both run under autocast. Raises
    `LayershareError`, with both models unchanged, if their blocks cannot stand in for each other, or if all are alike.
    """
    ours, theirs = find_blocks(student)[1], find_blocks(original)[1]
    if student.config.model_type != original.config.model_type or len(ours) != len(theirs):
        raise LayershareError(
            f"The model has {len(ours)} '{student.config.model_type}' blocks and its original {len(theirs)} "
            f"'{original.config.model_type}' blocks, so that one cannot be replaced by the other; train without "
            "replacement."
        )
    if any(isinstance(module, SlicedNorm) for module in student.modules()):
        raise LayershareError(
            "The blocks of a sliced model work on other hidden states than the original's; train without replacement."
        )
    changed = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not _alike(a, b)]
    if not changed:
        raise LayershareError("No block of the model differs from its original: there is nothing to replace.")
    last = max(len(changed) - 1, 1)
    found = [Gate(ours[i], theirs[i], i, rank / last, schedule) for rank, i in enumerate(changed)]
    for gate, i in zip(found, changed, strict=True):
        theirs[i].requires_grad_(False).eval()
        gate.enter()
    try:
        yield found
    finally:
        for gate in found:
            gate.leave()


def _alike(block: nn.Module, original: nn.Module) -> bool:
    """Whether a block has all weights of its original, compressed layers taken for the dense ones that they stand for.

    Compared in the original's dtype.
    """
    for name, tensor in original.state_dict().items():
        try:
            own = attrgetter(name)(block)
        except AttributeError:  # its sub-layer was dropped
            return False
        if not (isinstance(own, torch.Tensor) and torch.equal(own.detach().to(tensor.device, tensor.dtype), tensor)):
            return False
    return True


class ReplacementCallback(TrainerCallback):
    """Opens and closes the gates before each optimizer step, and logs the mean probability as `replacement`.

    A draw depends on (seed, step, block) alone: it is the same on every process and after a resume. If it would leave
    all gates closed before blocks that train, the one of these that missed by least is opened, or nothing that is
    trained might take part in the step.
    """

    def __init__(self, gates: Sequence[Gate], seed: int) -> None:
        self.gates, self.seed = gates, seed
        self.mean = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the gates for the step that begins."""
        probabilities = [gate.probability(state.global_step / state.max_steps) for gate in self.gates]
        misses = [
            Random(f"{self.seed} {state.global_step} {gate.number}").random() - p
            for gate, p in zip(self.gates, probabilities, strict=True)
        ]
        nearest = min((miss for gate, miss in zip(self.gates, misses, strict=True) if gate.trains), default=None)
        for gate, miss in zip(self.gates, misses, strict=True):
            gate.open = miss < 0 or miss == nearest
        self.mean = sum(probabilities) / len(probabilities)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the mean probability to a log of the training, for the callbacks after this one and for the history."""
        if logs is not None and "loss" in logs:
            logs[LOGGED] = state.log_history[-1][LOGGED] = self.mean
