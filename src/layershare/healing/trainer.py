"""The HF Trainer with our loss, our order of the data, and checkpoints that hold no more than what trains."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from layershare.errors import LayershareError
from layershare.foreign import reading
from layershare.formulas.linalg import root_mean_square
from layershare.healing.arguments import OPTIMIZER
from layershare.healing.objective import Objective

WEIGHTS = "trained.safetensors"
BEST = "best"
"""The folder of the trained parameters that were best on the held-out blocks so far."""
WHOLE = "whole"
"""The file that is written last into a checkpoint; one without it is half of one."""


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

    def __init__(self, model: nn.Module, objective: Objective, *, relative: bool = False, **options: Any) -> None:
        super().__init__(model, **options)
        self.objective = objective
        self.relative = relative
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
        """The optimizer, with a group per tensor if steps are `relative` to its size.

        Raises `LayershareError` for what it refuses in this model, if it is not installed, or for relative steps of
        tensors that are zero.
        """
        with reading(f"The optimizer '{self.args.optim}'", OPTIMIZER):
            optimizer = super().create_optimizer(model)
        if self.relative:
            groups, optimizer.param_groups = optimizer.param_groups, []
            for group in groups:
                for parameter in group["params"]:
                    lr = group["lr"] * root_mean_square(_whole(parameter))
                    if lr == 0:
                        raise LayershareError(
                            "optimizer.relative has steps of a part of each tensor's size, but some that train are all "
                            "zero, as adapters are at first; leave it out, or train factors."
                        )
                    optimizer.add_param_group({**group, "params": [parameter], "lr": lr})
        return optimizer

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
            tensor = _whole(parameter)
            whole[name] = tensor.cpu() if isinstance(parameter, DTensor) else tensor.contiguous()
        if not all(torch.isfinite(each).all() for each in whole.values()):
            raise self.diverged(f"after step {self.state.global_step}")
        return whole

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained parameters. Raises `Diverged` if one is not finite."""
        trained = self.gathered()
        if self.args.should_save:
            folder = Path(str(output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(trained, folder / f"{WEIGHTS}.new")
            (folder / f"{WEIGHTS}.new").replace(folder / WEIGHTS)  # never half of one in its place

    def keep_as_best(self) -> None:
        """Remember the trained parameters as they are now. Raises `Diverged` if one is not finite."""
        self.save_model(str(Path(str(self.args.output_dir)) / BEST))

    def take_best(self) -> None:
        """Set the trained parameters to what was remembered last."""
        assert self.model is not None
        self.accelerator.wait_for_everyone()  # until the main process has written it
        self._load_from_checkpoint(str(Path(str(self.args.output_dir)) / BEST))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trained = self._trained()
        with torch.no_grad():
            for name, tensor in load_file(Path(resume_from_checkpoint) / WEIGHTS).items():
                target = trained[name]
                if isinstance(target, DTensor):
                    tensor = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
                target.copy_(tensor)


def _whole(parameter: Tensor) -> Tensor:
    """A parameter, of which FSDP may have a shard on each rank, all of which have to call it then."""
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{WHOLE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
