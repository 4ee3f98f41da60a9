"""Run by `test_two_processes.py` in two processes: healing under DDP and FSDP2, and gradients under FSDP2."""

import os
import sys
import warnings
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from layershare.healing.objective import Objective
from layershare.healing.parameters import choose
from layershare.healing.replacement import gates
from layershare.healing.settings import Replacement
from layershare.model.hub import load
from tests.families import tokens
from tests.healing.tiny import heal, settings, text_for

DDP: dict[str, dict[str, Any]] = {
    "lora": {"train": "lora", "lora": {"targets": "factors"}, "norms": True},
    "replacement": {"train": "factors", "loss": {"kind": "both", "hidden": 0.1}, "replace": {}, "micro_batch": 1},
}
FSDP: dict[str, dict[str, Any]] = {
    "lora-sharded": {"train": "lora", "lora": {"targets": "factors"}, "norms": True},
    "full-sharded": {"train": "full", "loss": {"kind": "both"}},
}
STEPS = 4
LAUNCHED = {
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
"""What `accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP` sets."""


def shard() -> None:
    """From now on the Trainer shards by accelerate's FSDP2, which accelerate does for accelerators only."""
    os.environ |= LAUNCHED
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)  # pyright: ignore
    PartialState._reset_state()


def diverge(small: Path, out: Path) -> None:
    """A search whose first trial comes to no number on one rank alone: all ranks give it up."""
    steps = count()

    class Broken(Objective):
        def __call__(self, *inputs: Any) -> Any:
            loss, parts = super().__call__(*inputs)
            return (loss * float("nan") if next(steps) == 1 and dist.get_rank() == 1 else loss), parts

    with patch("layershare.healing.training.Objective", Broken):
        found = heal(small, out, train="factors", search={"trials": 2, "budget": 0.5})["search"]
    assert [trial["held_out_loss"] is None for trial in found["trials"]] == [True, False]


def gradients(small: Path, train: str, *, sharded: bool) -> dict[str, torch.Tensor]:
    """Name -> gradient of the loss with a teacher behind gates, some of them closed."""
    healing = settings(small, train=train, lora={"targets": "factors"}, loss={"kind": "both"})
    model, teacher = load(small), load(small.parent / "dense")
    torch.manual_seed(0)
    student = choose(model, healing).train()
    for name, parameter in student.named_parameters():
        if "lora_B" in name:  # which are zero at first
            torch.nn.init.normal_(parameter, std=0.1)
    with gates(model, teacher, Replacement(start=0.5)) as found:
        if sharded:
            units = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
            for unit in reversed(units):
                fully_shard(unit)
            fully_shard(student)
        for number, gate in enumerate(found):
            gate.open = number % 2 == 0
        Objective(healing.loss, model, teacher)(student, tokens(), torch.arange(2))[0].backward()
    whole = {}
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            whole[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return whole


def main(small: Path, out: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, options in DDP.items():
        print("ddp", name, flush=True)
        heal(small, out / name, text=text_for(small, STEPS), **options)
    for train in ("factors", "lora"):
        print("fsdp", train, flush=True)
        sharded, single = (gradients(small, train, sharded=sharded) for sharded in (True, False))
        assert sharded.keys() == single.keys()
        for name, gradient in single.items():
            torch.testing.assert_close(sharded[name], gradient, rtol=1e-3, atol=1e-6)
    diverge(small, out / "search")
    shard()
    for name, options in FSDP.items():
        print("fsdp", name, flush=True)
        heal(small, out / name, text=text_for(small, STEPS), **options)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
