"""Run by `test_parallel.py` in two processes: transformers' tensor parallelism and FSDP2 on compressed models."""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from layershare.model.layers import SharedLinear
from tests.families import tokens

# Column-wise with biases; row-wise with biases; fused projections with gathered outputs and split inputs.
TENSOR_PARALLEL = ("qwen2", "phi", "glm4")


def whole(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(model, folder: Path) -> None:
    """The parallel model's logits and gradients are those of the model in one process."""
    single = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(whole(model(ids).logits), single(ids).logits, rtol=1e-4, atol=1e-5)
    for each in (model, single):
        each(input_ids=ids, labels=ids).loss.backward()
    for (name, a), b in zip(model.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(whole(a.grad), b.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def tensor_parallel(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    factors = {n: p for n, p in model.named_parameters() if n.endswith((".basis.weight", ".coef.weight"))}
    deltas = {n: p for n, p in model.named_parameters() if n.endswith((".base.weight", ".down.weight", ".up.weight"))}
    for parts in (factors, deltas):
        assert any(isinstance(parameter, DTensor) for parameter in parts.values())
    compare(model, folder)
    again = folder.parent / f"{folder.name}-again"
    model.save_pretrained(again)
    dist.barrier()
    first, second = (AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (folder, again))
    assert all(torch.equal(first[key], second[key]) for key in first.keys() | second.keys())


def fsdp(folder: Path) -> None:
    compare(AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2)), folder)
    # The auto-wrap of accelerate: every class that must not be split is a unit.
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    units = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    assert SharedLinear in {type(module) for module in units}
    for module in reversed(units):
        fully_shard(module)
    compare(fully_shard(model), folder)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    for family in TENSOR_PARALLEL:
        print("tensor parallel", family, flush=True)
        tensor_parallel(folder / family)
    print("fsdp", flush=True)
    fsdp(folder / TENSOR_PARALLEL[0])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
