"""PEFT's adapters on layers that share: whoever names such a layer gets the adapter on its own part.

`q_proj` of a factored model is no linear but a product of two. An adapter around it could not be merged, because what
it adds has no place in the two factors; an adapter on the part that is the layer's own (coefficients, the delta's last
factor, the base of an anchor without one) can. PEFT has no public place for that, so `register` extends the function
with which all its methods resolve their targets; nothing here imports PEFT before the program does.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from functools import cache
from importlib import import_module
from typing import Any

from torch import nn

from layershare.errors import LayershareError
from layershare.model.dropped import DroppedAttention, DroppedLinear
from layershare.model.layers import ComposedLinear, QuantizedLinear

RESOLVER = "peft.tuners.tuners_utils"
"""The module of PEFT whose `_maybe_include_all_linear_layers` makes names of modules out of a config's targets."""
_KINDS = (ComposedLinear, DroppedAttention, DroppedLinear)


def register() -> None:
    """Have PEFT, which is imported, resolve targets by `resolve_targets` too; calling it again does nothing."""
    name = "_maybe_include_all_linear_layers"
    theirs = getattr(import_module(RESOLVER), name)
    if hasattr(theirs, "layershare"):
        return

    def resolve(config: Any, model: nn.Module) -> Any:
        resolve_targets(theirs(config, model), model)
        return config

    resolve.layershare = True  # pyright: ignore[reportFunctionMemberAccess]
    for module in [*sys.modules.values()]:  # some have imported it from there
        if getattr(module, "__name__", "").startswith("peft.") and vars(module).get(name) is theirs:
            setattr(module, name, resolve)


def resolve_targets(config: Any, model: nn.Module) -> None:
    """Put, in place, the parts that take the adapters for the targets that share, and leave out dropped ones.

    A config whose targets are ordinary modules stays as it is. Raises `LayershareError` if only dropped layers are
    left, for an adapter of another model, and for what PEFT would train in copies that share no more.
    """
    ours = {name: module for name, module in model.named_modules() if isinstance(module, _KINDS)}
    _refuse_copies(model, getattr(config, "modules_to_save", None) or ())
    if not ours or not getattr(config, "target_modules", None):
        return
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        _stay_beside(config)
    is_target = import_module(RESOLVER).check_target_module_exists
    named = [name for name, _ in model.named_modules() if is_target(config, name)]
    if not ours.keys() & {*named}:
        return
    if config.inference_mode or config.base_model_name_or_path not in (None, getattr(model, "name_or_path", None)):
        raise LayershareError(
            "This adapter was trained on another model, whose layers are not compressed: merge it into that model and "
            "compress the result, or train one for this model."
        )
    part = {name: _own(name, ours[name]) if name in ours else name for name in named}
    if not (targets := {each for each in part.values() if each is not None}):
        raise LayershareError("All layers that the adapter names were dropped from this model: name others.")
    for key in ("rank_pattern", "alpha_pattern"):
        if patterns := getattr(config, key, None):
            own = "|".join(
                sorted({each.removeprefix(f"{name}.") for name, each in part.items() if each and name in ours})
            )
            setattr(config, key, {rf"(?:{word})(?:\.(?:{own}))?": value for word, value in patterns.items()})
    if words := getattr(config, "feedforward_modules", None):  # of IA3
        forward = {each for name, each in part.items() if each is not None and _is_forward(words, name)}
        config.feedforward_modules = forward
    config.target_modules = targets


def _stay_beside(config: Any) -> None:
    """Have adapters on quantized weights refuse to be merged, which would be lost. Raises for others than LoRA's."""
    if not hasattr(config, "_register_custom_module"):
        raise LayershareError(f"A quantized model takes adapters of LoRA alone, no {type(config).__name__}.")
    config._register_custom_module({QuantizedLinear: _quantized_adapter()})


@cache
def _quantized_adapter() -> type:
    linear: Any = import_module("peft.tuners.lora").Linear

    class QuantizedAdapter(linear):
        """LoRA's adapter on a quantized weight."""

        def merge(self, *_: Any, **__: Any) -> None:
            """Raise `LayershareError`."""
            raise LayershareError(
                "An adapter cannot be merged into quantized weights: keep it beside them, or merge it into the model "
                "before that is quantized."
            )

    return QuantizedAdapter


def _own(name: str, layer: nn.Module) -> str | None:
    """The name of the part of a layer that takes its adapter, `None` for a dropped one."""
    if not isinstance(layer, ComposedLinear):
        return None
    return next(f"{name}.{child}" for child, part in layer.named_children() if part is layer.coefficient)


def _is_forward(words: str | Collection[str], name: str) -> bool:
    """Whether IA3 takes the layer of this name for a feed-forward one."""
    return re.fullmatch(words, name) is not None if isinstance(words, str) else name.endswith(tuple(words))


def _refuse_copies(model: nn.Module, words: Collection[str]) -> None:
    """Raise for modules that PEFT would copy, and that hold layers which share with others."""
    for name, module in model.named_modules():
        if name.endswith(tuple(words)) and any(isinstance(each, ComposedLinear) for each in module.modules()):
            raise LayershareError(
                f"modules_to_save would train a copy of '{name}', which no longer shares with other layers; "
                "name its parts instead."
            )
