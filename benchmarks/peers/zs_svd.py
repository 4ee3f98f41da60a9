"""Zero-Sum-SVD: its main program, with our model and tokens in place of those that it loads."""

import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.peers.driver import Factors, factors_in


def compress(model: PreTrainedModel, tokens: Tensor, keep: float, *, arguments: list[str]) -> Factors:
    """What the program with these arguments makes of the model; it stores its factors in half precision."""
    program: Any = import_module("main_zero_sum")
    batches = [{"input_ids": block, "attention_mask": torch.ones_like(block)} for block in tokens.split(1)]
    program.get_model_from_huggingface = lambda model_id: (model, None)
    program.get_calib_train_data = lambda *_, **__: batches
    # `--time_analysis` leaves out its own loading, saving and evaluating, and nothing else.
    size = ["--global_prune_ratio", f"{1 - keep:.6f}", "--nsamples", str(len(batches))]
    sys.argv += ["--model", "llama", "--DEV", "cpu", "--time_analysis", *size, *arguments]
    program.main()
    return factors_in(model, program.LowRankLinear, "u_proj", "v_proj")
