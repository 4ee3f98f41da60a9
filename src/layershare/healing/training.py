"""One training: the model, its teacher and the Trainer together, from the last checkpoint on."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from layershare.errors import LayershareError
from layershare.healing.arguments import arguments
from layershare.healing.distill import StoredLogits
from layershare.healing.job import HealJob
from layershare.healing.objective import Objective
from layershare.healing.parameters import merge
from layershare.healing.replacement import ReplacementCallback, gates
from layershare.healing.trainer import HealTrainer, Ordered, last_checkpoint
from layershare.healing.watch import Watch, best
from layershare.model.arch import find_blocks
from layershare.progress import Progress, Say


@contextmanager
def compiled(*models: PreTrainedModel | None) -> Iterator[None]:
    """Models whose blocks are compiled one by one for the duration.

    It is their `forward` that is: gates, hooks and gradient checkpointing stay outside and compile nothing anew.
    """
    blocks = [block for model in models if model is not None for block in find_blocks(model)[1]]
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
    # Blocks of one class share their code's cache, and every block that differs has entries of its own in it.
    limit = 8 * len(blocks) + 8
    try:
        with torch._dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=8 * limit):
            yield
    finally:
        for block in blocks:
            del block.forward
        torch._dynamo.reset()


@dataclass(frozen=True)
class Trained:
    """A model after training, without adapters, on the CPU; the Trainer's log; tokens per second."""

    model: PreTrainedModel
    log: list[dict[str, Any]]
    speed: float

    @property
    def held_out_loss(self) -> float:
        """That of the best measurement on the held-out blocks, after which the model is as it was then."""
        return best(self.log)["held_out_loss"]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave random numbers and transformers' log level as they were, which the Trainer sets."""
    verbosity, ours = logging.get_verbosity(), random.getstate()
    theirs = numpy.random.get_state()  # noqa: NPY002  # it is the global generator that is seeded
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(ours)
        numpy.random.set_state(theirs)  # noqa: NPY002
        logging.set_verbosity(verbosity)


@_undisturbed()
def train(
    job: HealJob, teacher: PreTrainedModel | StoredLogits | None, folder: Path, progress: Progress, say: Say
) -> Trained:
    """Train, from the last checkpoint in the folder if there is one. Raises `Diverged` as `HealTrainer` does."""
    healing, student = job.healing, job.student()
    options = arguments(healing, folder, job.steps, job.micro, job.processes, job.device)
    data = Ordered(job.train_tokens, job.steps * healing.batch_size, healing.text.seed)
    model = student if isinstance(student, PreTrainedModel) else student.get_base_model()
    original = teacher if isinstance(teacher, PreTrainedModel) else None
    if original is not None:
        original.to(options.device)  # pyright: ignore[reportArgumentType]
    with ExitStack() as stack:
        if job.device == "cpu":
            stack.enter_context(_no_denormals())
        if healing.compile:
            stack.enter_context(compiled(model, original))
        objective, relative = Objective(healing.loss, model, teacher), healing.optimizer.relative
        trainer = HealTrainer(student, objective, relative=relative, args=options, train_dataset=data)
        if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
            raise LayershareError("FSDP of version 1 cannot train layers that share; launch with --fsdp_version 2.")
        if healing.replace is not None:
            assert original is not None
            found = stack.enter_context(gates(model, original, healing.replace))
            trainer.add_callback(ReplacementCallback(found, healing.seed))
        every = healing.evaluate_every or max(1, job.steps // 10)
        nearest_to = original if healing.loss.kind == "distill" else None
        watch = Watch(trainer, job.held_out, every, job.micro, progress, say, nearest_to)
        trainer.add_callback(watch)
        checkpoint = last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trained = merge(_whole(job, trainer, student))
    trained.config.use_cache = job.config.use_cache
    return Trained(trained.requires_grad_(True).cpu(), trainer.state.log_history, watch.speed)


@contextmanager
def _no_denormals() -> Iterator[None]:
    """Count numbers below the normal ones as zero, since a CPU multiplies them slowly; afterwards as before."""
    before = bool(torch.tensor(1e-310, dtype=torch.float64) * 1 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _whole(job: HealJob, trainer: HealTrainer, student: Any) -> Any:
    """The model as it was best on held-out blocks, out of what accelerate wrapped it in.

    Where it was sharded, or never better than at first, it is loaded anew.
    """
    if best(trainer.state.log_history)["step"] == 0:
        return job.student()
    trainer.take_best()
    if not trainer.is_fsdp_enabled:
        return trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False)
    whole = job.student()
    unknown = whole.load_state_dict(trainer.gathered(), strict=False).unexpected_keys
    assert not unknown, unknown
    return whole
