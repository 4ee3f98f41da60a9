"""What the HF Trainer is given, and whether it, its optimizers and its schedules take it."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from layershare.errors import LayershareError, unknown
from layershare.foreign import reading
from layershare.healing.settings import Healing

OPTIMIZER = "change optimizer.name, optimizer.schedule or what else is set of the optimizer"


def require_known(healing: Healing) -> None:
    """Raise `LayershareError` for an optimizer, schedule or tracker that the Trainer does not know."""
    optimizer = healing.optimizer
    if optimizer.name not in list(OptimizerNames):
        raise unknown("optimizer", optimizer.name, [each.value for each in OptimizerNames])
    if optimizer.name.startswith(("galore", "apollo")) and not optimizer.targets:
        raise LayershareError(f"'{optimizer.name}' needs optimizer.targets, such as [attn, mlp]: what it projects.")
    if optimizer.targets and not optimizer.name.startswith(("galore", "apollo")):
        raise LayershareError(f"'{optimizer.name}' projects nothing, so optimizer.targets says nothing; leave it out.")
    if optimizer.schedule not in list(SchedulerType):
        raise unknown("schedule", optimizer.schedule, [each.value for each in SchedulerType])
    available = get_available_reporting_integrations()
    for tracker in healing.report_to:
        if tracker not in available:
            raise LayershareError(
                f"The tracker '{tracker}' is unknown or not installed; there is {', '.join(available) or 'none'}."
            )


def require_optimizer(healing: Healing, device: str) -> None:
    """Raise `LayershareError` for what only optimizer and schedule can judge, such as arguments.

    They are made for a tiny model. Optimizers that project are judged when they meet their targets.
    """
    optimizer = healing.optimizer
    with reading(f"The optimizer '{optimizer.name}' with the schedule '{optimizer.schedule}'", OPTIMIZER):
        options = arguments(healing, Path(), 10, 1, 1, device)
        if optimizer.targets:
            return
        model: Any = nn.Linear(1, 1)
        kind, given = Trainer.get_optimizer_cls_and_kwargs(options, model)
        if optimizer.arguments is not None:
            plain = copy.copy(options)
            plain.optim_args = None
            if Trainer.get_optimizer_cls_and_kwargs(plain, model) == (kind, given):
                raise ValueError(f"it takes nothing of '{optimizer.arguments}'")
        if is_optimizer_factory(kind):
            return
        made = kind(given.pop("model", model).parameters(), **given)
        get_scheduler(options.lr_scheduler_type, made, 1, 10)


def arguments(healing: Healing, folder: Path, steps: int, micro: int, processes: int, device: str) -> TrainingArguments:
    """The Trainer's arguments for a healing of so many steps, in micro-batches of `micro` rows."""
    optimizer = healing.optimizer
    # Where a gate takes the original's block, the student's gets no gradient.
    unused = healing.replace is not None
    log = healing.log_every or max(1, steps // 50)
    save = healing.save_every or max(1, steps // 10)
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True} if healing.gradient_checkpointing else {}
    with warnings.catch_warnings():
        # Newer versions of transformers have another name for it, older ones do not know that.
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        made = TrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=healing.batch_size // (micro * processes),
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            ddp_find_unused_parameters=unused,
            dataloader_pin_memory=device != "cpu",
            optim=optimizer.name,
            optim_target_modules=list(optimizer.targets) or None,
            optim_args=optimizer.arguments,
            learning_rate=optimizer.lr,
            lr_scheduler_type=optimizer.schedule,
            warmup_steps=math.ceil(optimizer.warmup * steps),
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            bf16=healing.precision == "bfloat16",
            use_cpu=device == "cpu",
            **checkpointing,
            logging_steps=log,
            logging_nan_inf_filter=False,
            save_steps=-(-save // log) * log,  # a resumed log then means over the same steps
            save_total_limit=2,
            report_to=list(healing.report_to),
            disable_tqdm=True,
            log_level="error",
            log_level_replica="error",
            seed=healing.seed,
        )
    made._n_gpu = min(made.n_gpu, 1)  # or one process would train on every GPU that it sees, in threads
    return made
