"""SVD-LLM: whitening and truncating, the first step of its main program."""

from importlib import import_module
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.peers.driver import Factors


def compress(model: PreTrainedModel, tokens: Tensor, keep: float) -> Factors:
    """What `SVDLLM.py --step 1` makes of the model."""
    program = import_module("SVDLLM")
    layers: Any = model.get_decoder().layers
    names = list(program.find_layers(layers[0]))
    whitened = program.profle_svdllm("llama", model, [{"input_ids": batch} for batch in tokens.split(8)], "cpu")
    program.whitening("llama", model, whitened, keep, "cpu")

    def factors(number: int, name: str) -> list[Tensor]:
        part, leaf = name.split(".")
        parts = getattr(layers[number], part)
        role = leaf.removesuffix("_proj")
        return [getattr(parts, f"{role}_{side}_proj").weight for side in "uv"]

    return {f"model.layers.{i}.{name}": factors(i, name) for i in range(len(layers)) for name in names}
