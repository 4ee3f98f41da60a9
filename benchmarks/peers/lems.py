"""LEMS: KFAC-SVD with ranks from its search, by its orchestrator; the integer programme is solved by CBC."""

import sys
from contextlib import nullcontext
from importlib import import_module
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.peers.driver import Factors, factors_in

TOGETHER = 2048
"""Tokens of a batch: of twice as many its hooks and SmolLM2-135M's activations do not fit into 24 GB."""
SEARCHED, LENGTH = 8, 512
"""Sequences, and the tokens of each, that ranks are searched on. It needs at least 8, and leaves out the first 256
tokens of each."""


def compress(model: PreTrainedModel, tokens: Tensor, keep: float, *, search: str) -> Factors:
    """What it makes of the model with the settings of its preset kfac_lems and this search; needs pulp and optuna."""
    # What it imports and does not use here, and what it asks a GPU for.
    sys.modules.update({name: MagicMock() for name in ("gurobipy", "matplotlib", "matplotlib.pyplot")})
    cuda: Any = torch.cuda
    cuda.current_device, cuda.device = lambda: "cpu", nullcontext
    core = import_module("compression.svd_core")
    factorizer = core.ModelFactorizer(
        "kfac_svd",
        {"vision": False, "fast": True, "use_cache": False, "do_post_calibration": "False"},
        search,
        {
            "ratio_target": keep,
            "sensitivity_loss": "energy2_normal_klscaled",
            "crosslayer_term": "harmonicv2",
            "hgamma": 5.0,
            "enforce_rank_multiples_of": 8,
            "solver": "cbc",
        },
    )
    searched = tokens.flatten()[: SEARCHED * LENGTH].view(SEARCHED, 1, LENGTH)
    batches = tokens.split(max(1, TOGETHER // tokens.shape[1]))
    calibration, searching = ([{"input_ids": each} for each in part] for part in (batches, searched))
    names = ["norm", "patch_embed", "head", "downsample", "decoder.project_", "dt_proj"]  # its config's name_omit
    factorizer.factorize_and_search(model, calibration, searching, None, "ours", names)
    factorized = import_module("compression.factorization._interface").SeqSVD
    return factors_in(model, factorized, "mod_b", "mod_a")
