"""What the drivers of all peers share: the process that a peer's code runs in, and the folder that it leaves.

A driver is a module here that is named as the peer, with a function

    compress(model, tokens, keep, **options) -> Factors

which imports modules out of the peer's checkout and has them compress the model, in place or not, on token blocks
(n × length) to a fraction of the parameters of its targets.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from layershare.model.arch import Spec
from layershare.model.describe import describe
from layershare.model.hub import load
from layershare.model.source import read_config, read_tokenizer

Factors = dict[str, list[Tensor]]
"""Name of a linear in the model -> the matrices whose product is its weight, d_out × d_in. Linears may share one."""


class OnCPU(TorchFunctionMode):
    """Puts on the CPU what a peer's code puts on "cuda"."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.cuda, Tensor.pin_memory):
            return args[0]
        return func(*map(_on_cpu, args), **{key: _on_cpu(value) for key, value in (kwargs or {}).items()})


def _on_cpu(value: Any) -> Any:
    is_cuda = isinstance(value, str | torch.device) and str(value).startswith("cuda")
    return torch.device("cpu") if is_cuda else value


def factors_in(model: nn.Module, kind: type[nn.Module], *parts: str) -> Factors:
    """The factors in a peer's modules of one kind, whose parts are linears: the last reads the input."""
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
    return {name: [module.get_parameter(f"{part}.weight") for part in parts] for name, module in modules}


def parameters(spec: Spec, factors: Factors) -> int:
    """How many parameters the targets have, a shared matrix counted once and targets without factors whole."""
    own = {id(matrix): matrix.numel() for matrices in factors.values() for matrix in matrices}
    whole = [each.parameters for each in spec.linears if spec.base_prefix + each.name not in factors]
    return sum(own.values()) + sum(whole)


def write(model: PreTrainedModel, factors: Factors, original: str, out: Path) -> None:
    """Write the original with the products of the factors, and with all else as it is in the peer's model."""
    dense = load(original, dtype=torch.float32)
    names = dense.state_dict().keys()
    state = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    products = {f"{name}.weight": reduce(torch.matmul, matrices) for name, matrices in factors.items()}
    dense.load_state_dict({**state, **products}, strict=False)
    dense.save_pretrained(out)
    read_tokenizer(original).save_pretrained(out)


def carry_out(
    peer: str, checkout: str, original: str, tokens: Tensor, keep: float, options: dict[str, Any], out: Path
) -> None:
    """In the fresh process: have the peer's code compress a model; leaves a dense model and kept.json in `out`.

    What the peer's code prints goes to log.txt there, and `out` is where it runs.
    """
    driver = import_module(f"benchmarks.peers.{peer.replace('-', '_')}")
    model = load(original, dtype=torch.float32)
    out.mkdir(parents=True)
    os.chdir(out)
    sys.path.insert(0, checkout)
    sys.argv = [peer]
    start = time.perf_counter()
    with open("log.txt", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log), OnCPU():
        found = driver.compress(model, tokens, keep, **options)
    seconds = round(time.perf_counter() - start, 1)
    factors = {name: [matrix.detach().float() for matrix in matrices] for name, matrices in found.items()}
    write(model, factors, original, out)
    kept = {"parameters": parameters(describe(read_config(original)), found), "seconds": seconds}
    (out / "kept.json").write_text(json.dumps(kept))
