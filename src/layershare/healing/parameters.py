"""Which parameters train, by name; LoRA is PEFT's, and is merged when training is done."""

import warnings
from importlib.util import find_spec
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import check_target_module_exists

from layershare.errors import LayershareError, how_to_install, unknown
from layershare.healing.settings import Healing, Lora
from layershare.model.arch import find_blocks
from layershare.model.layers import ComposedLinear, QuantizedLinear, SharedLinear
from layershare.model.norms import norm_parameters
from layershare.model.parallel import adapt_sharding


def choose(model: PreTrainedModel, healing: Healing) -> Any:
    """Freeze all of a model but what is to train; returns the model to train, with adapters around it for LoRA.

    Raises `LayershareError` if nothing of the kind is there, for quantized weights, and if PEFT is missing.
    """
    if healing.train != "norms" and any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise LayershareError(
            f"'{healing.model}' is quantized, and quantized weights do not train: heal the model that was quantized, "
            "then quantize the result, or use --train norms."
        )
    names = {
        "lora": set,
        "factors": lambda: factors(model),
        "norms": lambda: set(norm_parameters(model)),
        "full": lambda: {name for name, _ in model.named_parameters()},
        "deltas": lambda: deltas(model),
    }[healing.train]()
    targets = lora_targets(model, healing.lora) if healing.train == "lora" else []
    if not names and not targets:
        raise LayershareError(f"'{healing.model}' has no {healing.train} to train; use another --train, such as full.")
    projected = healing.optimizer.targets
    if projected and not any(check_target_module_exists(projected, name) for name, _ in model.named_modules()):
        raise LayershareError(f"No module of '{healing.model}' has one of optimizer.targets in its name; name others.")
    if healing.norms:
        names |= set(norm_parameters(model))
    if targets:
        model = _adapt(model, healing.lora, targets)
        names = {f"base_model.model.{name}" for name in names}
        names |= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model


def factors(model: nn.Module) -> set[str]:
    """The names of all bases and coefficients."""
    return {
        f"{name}.{child}.weight"
        for name, module in _composed(model).items()
        if not module.composition.whole
        for child, _ in module.named_children()
    }


def deltas(model: nn.Module) -> set[str]:
    """The names of the factors of every delta."""
    return {
        f"{name}.{factor.name}.weight"
        for name, module in _composed(model).items()
        if module.composition.whole
        for factor in module.factors
        if factor.home is None
    }


def _composed(model: nn.Module) -> dict[str, ComposedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ComposedLinear)}


def lora_targets(model: PreTrainedModel, lora: Lora) -> list[str]:
    """The names of the linears that get an adapter. Raises `LayershareError` for a name that no linear has."""
    stack, _ = find_blocks(model)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    inside = {name: module for name, module in model.named_modules() if name.startswith(f"{prefix}{stack}.")}
    linears = [name for name, module in inside.items() if isinstance(module, nn.Linear | Conv1D)]
    composed = {name: module for name, module in _composed(model).items() if name in inside}
    parts = {f"{name}.{child}": name for name, module in composed.items() for child, _ in module.named_children()}
    own = {f"{name}.{factor.name}" for name, module in composed.items() for factor in module.coefficients}
    if lora.targets == "linears":
        return linears
    if lora.targets == "factors":
        found = list(parts)
    elif lora.targets == "coefficients":
        found = [name for name in parts if name in own and not isinstance(inside[name], SharedLinear)]
    else:
        # A composed layer goes by its own name, and its coefficients get the adapter.
        called = {
            name: parts.get(name, name).rpartition(".")[2] for name in linears if name not in parts or name in own
        }
        for word in lora.targets:
            if word not in called.values():
                raise unknown("LoRA target", word, set(called.values()))
        return [name for name, word in called.items() if word in lora.targets]
    if not found:
        raise LayershareError(
            f"No matrix of this model is factored, so it has no {lora.targets}; use lora.targets=linears."
        )
    return found


def merge(model: Any) -> PreTrainedModel:
    """The model without its adapters, which are added to the weights in place; one without is returned as it is."""
    return model if isinstance(model, PreTrainedModel) else model.merge_and_unload()


def _adapt(model: PreTrainedModel, lora: Lora, targets: list[str]) -> Any:
    if find_spec("peft") is None:
        raise LayershareError(f"LoRA needs PEFT: {how_to_install('heal')}.")
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear

    class SharedAdapter(Linear):
        """The adapter of what several layers share, a class of its own as that is."""

    limit = max(max(p.shape) for name in targets for p in model.get_submodule(name).parameters() if p.dim() == 2)
    if lora.rank > limit:
        raise LayershareError(f"lora.rank={lora.rank} is more than the width {limit} of the matrices that it adapts.")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  # any number will do
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({SharedLinear: SharedAdapter})
    with warnings.catch_warnings():
        # PEFT asks by a name that transformers has since changed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = get_peft_model(model, config)
    adapt_sharding(model, SharedAdapter)
    return adapted
