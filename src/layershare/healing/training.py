"""The HF Trainer with our loss, our order of the data, and checkpoints that hold no more than what trains."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from layershare.errors import LayershareError
from layershare.foreign import reading
from layershare.healing.arguments import OPTIMIZER, arguments
from layershare.healing.distill import StoredLogits, cross_entropy
from layershare.healing.job import HealJob
from layershare.healing.objective import Objective
from layershare.healing.parameters import merge
from layershare.healing.replacement import ReplacementCallback, gates
from layershare.model.arch import find_blocks
from layershare.model.modes import evaluating
from layershare.progress import Progress, Say
from layershare.units import duration

WEIGHTS = "trained.safetensors"
WHOLE = "whole"
"""The file that is written last into a checkpoint; one without it is half of one."""
_TIMED = 5
"""Steps after which the time that is left is told; the first one, which compiles, is not counted."""


class Ordered(Dataset):
    """Blocks [n, length] of a text in the order in which they are trained on: `size` of them, epoch after epoch.

    Every epoch has its own permutation, and all follow from the seed: the order is the same on every rank and after a
    resume. If fewer blocks are needed than exist, the first are used.
    """

    def __init__(self, tokens: Tensor, size: int, seed: int) -> None:
        self.tokens = tokens[:size]
        epochs, rows = math.ceil(size / len(tokens)), len(self.tokens)
        generator = torch.Generator().manual_seed(seed)
        self.order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(epochs)])[:size]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.order[index]
        return {"input_ids": self.tokens[row], "row": row}


class Diverged(LayershareError):
    """The loss, or a weight, is no number."""


class HealTrainer(Trainer):
    """The Trainer: what is ours is the loss, the order, and what a checkpoint holds."""

    def __init__(self, model: nn.Module, objective: Objective, **options: Any) -> None:
        super().__init__(model, **options)
        self.objective = objective
        self.model_accepts_loss_kwargs = False  # the loss is a mean, which the Trainer divides by accumulation steps
        self.remove_callback(PrinterCallback)
        self._parts: dict[str, list[Tensor]] = {}

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:
        """The objective. Raises `Diverged` if it is not a number."""
        with self.accelerator.autocast():  # the student has it anyway, the teacher has not
            loss, parts = self.objective(model, inputs["input_ids"], inputs["row"])
        # Of all processes: were it one alone that stops, the others would wait for it.
        if not torch.isfinite(self.accelerator.gather(loss.detach()[None])).all():  # pyright: ignore[reportArgumentType]
            raise self.diverged(f"in step {self.state.global_step + 1}")
        for name, part in parts.items():
            self._parts.setdefault(name, []).append(part.detach())
        return loss

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer. Raises `LayershareError` for what it refuses in this model, or if it is not installed."""
        with reading(f"The optimizer '{self.args.optim}'", OPTIMIZER):
            return super().create_optimizer(model)

    def diverged(self, when: str) -> Diverged:
        """The error for a loss or weights that are no numbers."""
        kept = last_checkpoint(Path(str(self.args.output_dir)))
        where = f"; the last good checkpoint is '{kept}'" if kept else ""
        return Diverged(
            f"The loss is not a number {when}{where}. Start again with a smaller optimizer.lr, in another folder."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the parts of the loss beside it."""
        for name, values in self._parts.items():
            gathered = self.accelerator.gather(torch.stack(values).mean()[None])
            logs[name] = gathered.mean().item()  # pyright: ignore[reportAttributeAccessIssue]
        self._parts.clear()
        super().log(logs, start_time)

    def _trained(self) -> dict[str, nn.Parameter]:
        assert self.model is not None
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def gathered(self) -> dict[str, Tensor]:
        """Name -> trained parameter, whole: what FSDP has sharded is gathered, into the CPU's memory.

        Every rank has to call it. Raises `Diverged` if one is not finite.
        """
        whole = {}
        for name, parameter in self._trained().items():
            tensor = parameter.detach()
            whole[name] = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor.contiguous()
        if not all(torch.isfinite(each).all() for each in whole.values()):
            raise self.diverged(f"after step {self.state.global_step}")
        return whole

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained parameters. Raises `Diverged` if one is not finite."""
        trained = self.gathered()
        if self.args.should_save:
            folder = Path(str(output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(trained, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trained = self._trained()
        with torch.no_grad():
            for name, tensor in load_file(Path(resume_from_checkpoint) / WEIGHTS).items():
                target = trained[name]
                if isinstance(target, DTensor):
                    tensor = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
                target.copy_(tensor)


class Watch(TrainerCallback):
    """Reports progress, tells how it goes, measures on held-out blocks, and marks checkpoints that are whole."""

    def __init__(
        self, trainer: HealTrainer, held_out: Tensor, every: int, rows: int, progress: Progress, say: Say
    ) -> None:
        self.trainer, self.held_out, self.every, self.rows = trainer, held_out, every, rows
        self.progress, self.say = progress, say
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
            nll = held_out_loss(self.trainer.model_wrapped, self.held_out, self.rows, self.trainer.args.device)
        if not math.isfinite(nll):
            if state.global_step == 0:
                raise LayershareError(
                    "The loss on held-out blocks is not a number even before training; set precision=float32, or "
                    "compress the model anew."
                )
            raise self.trainer.diverged(f"after step {state.global_step}")
        perplexity, length = math.exp(min(nll, 700)), self.held_out.shape[1]
        state.log_history.append({"held_out_loss": nll, "held_out_perplexity": perplexity, "step": state.global_step})
        self.say(
            f"step {state.global_step} of {state.max_steps}: held-out perplexity {perplexity:.4g}, blocks of {length:,}"
        )


@torch.no_grad()
def held_out_loss(model: Any, tokens: Tensor, rows: int, device: torch.device) -> float:
    """Mean negative log-likelihood, in nats per token, of blocks [n, length], so many at once."""
    with evaluating(model):
        sums = [
            len(batch) * cross_entropy(model(input_ids=batch, use_cache=False).logits, batch)
            for batch in tokens.to(device).split(rows)
        ]
    return float(torch.stack(sums).double().sum()) / len(tokens)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{WHOLE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


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
        """That of the last measurement on the held-out blocks."""
        return next(entry["held_out_loss"] for entry in reversed(self.log) if "held_out_loss" in entry)


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
        trainer = HealTrainer(student, Objective(healing.loss, model, teacher), args=options, train_dataset=data)
        if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
            raise LayershareError("FSDP of version 1 cannot train layers that share; launch with --fsdp_version 2.")
        if healing.replace is not None:
            assert original is not None
            found = stack.enter_context(gates(model, original, healing.replace))
            trainer.add_callback(ReplacementCallback(found, healing.seed))
        every = healing.evaluate_every or max(1, job.steps // 10)
        watch = Watch(trainer, job.held_out, every, job.micro, progress, say)
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
    """The trained model out of what accelerate wrapped it in; where it was sharded, it is loaded anew."""
    if not trainer.is_fsdp_enabled:
        return trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False)
    whole = job.student()
    unknown = whole.load_state_dict(trainer.gathered(), strict=False).unexpected_keys
    assert not unknown, unknown
    return whole
