"""A model that is built and run from its config alone, without memory for its weights."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

T = TypeVar("T")
_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


def run_skeleton(
    config: PreTrainedConfig,
    dtype: torch.dtype | str,
    watch: Callable[[PreTrainedModel, AbstractContextManager[Any]], T],
) -> tuple[PreTrainedModel, T]:
    """A skeleton of the model, and what `watch` returns that runs it within the context that it is given.

    The tensors have shapes alone. If the model's code looks at values, as dynamic rotary positions do, it gets real
    ones, made by `_hollow`. Both are kept, since a run describes its model several times, and are not to be changed.
    """
    attention = getattr(config, "_attn_implementation", None)
    values = config.to_json_string(use_diff=False)
    return _run(_Built(type(config), values, attention, dtype, copy.deepcopy(config)), watch)


@dataclass(frozen=True)
class _Built:
    """What a skeleton is built from: equal where the skeletons are."""

    kind: type
    values: str
    attention: str | None
    dtype: torch.dtype | str
    config: PreTrainedConfig = field(compare=False)


@lru_cache(maxsize=32)
def _run(built: _Built, watch: Callable[[PreTrainedModel, AbstractContextManager[Any]], Any]) -> Any:
    config, dtype = built.config, built.dtype
    try:
        with FakeTensorMode() as fake:
            skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
        return skeleton, watch(skeleton, fake)
    except _NEEDS_VALUES:
        skeleton = _hollow(config, dtype)
        return skeleton, watch(skeleton, nullcontext())


def _hollow(config: PreTrainedConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    """A model that runs on real tokens, but whose weights are one zero each and whose linears multiply nothing.

    So it takes no memory and next to no time, whatever its size.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))
        if isinstance(module, nn.Linear | Conv1D):
            width = module.nf if isinstance(module, Conv1D) else module.out_features
            linear: Any = module
            linear.forward = partial(_zeros, width)
    model.tie_weights()  # the parameters were made anew
    return model


def _zeros(width: int, input: torch.Tensor) -> torch.Tensor:
    return input.new_zeros(*input.shape[:-1], width)
