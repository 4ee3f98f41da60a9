"""AA-SVD: each block with factors as of SVD-LLM, trained to give what the original gives."""

import sys
from importlib import import_module
from types import SimpleNamespace
from unittest.mock import MagicMock

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.peers.driver import Factors, factors_in


def compress(model: PreTrainedModel, tokens: Tensor, keep: float) -> Factors:
    """What it makes of the model with its own settings."""
    # What it imports to read configs, to log and to quantize, and does not use here.
    sys.modules.update(omegaconf=MagicMock(), wandb=MagicMock(run=None), bitsandbytes=MagicMock())
    compression = import_module("aa_svd.compression")
    linear = import_module("aa_svd.compression.compressed_linear").CompressedLinear
    settings = {"sub_method": "obj2", "exclude_only": ["lm_head"], "target_param_ratio": keep}
    training = {"enabled": True, "include": "all"}
    # Eight batches as with its own 256 samples, so that training takes as many steps.
    batches = [{"input_ids": batch, "targets": batch} for batch in tokens.chunk(8)]
    small = compression.apply_compression(
        model, SimpleNamespace(**settings, finetune=training), calibration_dataloader_train=batches
    )
    return factors_in(small, linear, "U", "V")
