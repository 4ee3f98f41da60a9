"""Basis Sharing: the Grams, groups and ranks of its model factory, without its model class (of an old transformers)."""

from importlib import import_module
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.peers.driver import Factors

READ = {"mlp.gate_proj": "mlp.up_proj", "self_attn.q_proj": "self_attn.k_proj", "self_attn.v_proj": "self_attn.k_proj"}
"""Linears whose Gram matrices it takes from another that reads the same."""
PRIVATE = ("self_attn.o_proj", "mlp.down_proj")
"""What its configs leave private to each layer."""


def compress(model: PreTrainedModel, tokens: Tensor, keep: float, *, group_size: int) -> Factors:
    """The bases and coefficients that its model would be filled with, `group_size` adjacent layers to a group."""
    calib, groups, utils = (import_module(name) for name in ("calib", "group", "utils"))
    layers: Any = model.get_decoder().layers
    names = [*sorted({*READ, *READ.values()}), *PRIVATE]
    measured = [name for name in names if name not in READ]
    batches = [{"input_ids": batch} for batch in tokens.split(8)]
    calib.Calib.build_calibration_dataset(model, batches, measured, "llama2", "calib")
    factors: Factors = {}
    for name in names:
        d_out, d_in = layers[0].get_submodule(name).weight.shape
        size = 1 if name in PRIVATE else group_size
        for first in range(0, len(layers), size):
            members = list(range(first, min(first + size, len(layers))))
            rank = utils.compute_num_basis(d_in, d_out, size, 100 - 100 * keep)
            whitening = calib.Calib.get_s_inv_s(members, name, "llama2", "calib")
            found = groups.Group(model, members, name, d_out, "llama2", *whitening)
            basis = found.basis[:, :rank].T
            for layer, coefficients in found._get_coefficient_split().items():
                factors[f"model.layers.{layer}.{name}"] = [coefficients[name][:rank].T, basis]
    return factors
