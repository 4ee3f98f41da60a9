"""The one check of models in memory: what stands around or in a model that cannot be taken as it is."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from layershare.errors import LayershareError

_PLAIN = "AutoModelForCausalLM.from_pretrained(…)"
_ABSENT = "has no weights in memory, because they are offloaded or it was made on the meta device"
_COMPILED = "_orig_mod"


def require_model(model: Any, *, what: str = "model", weights: bool = True) -> PreTrainedModel:
    """The model, if it is a causal language model as transformers loads it: not wrapped, adapted or quantized.

    `weights`: they must be in memory, too. `what` is its name in the sentence. Raises `LayershareError`, which says
    what to give in its place.
    """
    if isinstance(model, nn.Module) and _has_adapters(model):
        raise LayershareError(f"The {what} carries adapters of PEFT: merge or unload the adapters first.")
    if (inner := _inner_name(model)) is not None:
        raise _wrapped(model, inner, what)
    model = _require_causal(model, what)
    if packed := [name for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)]:
        raise LayershareError(f"'{packed[0]}' of the {what} is quantized: load the unquantized weights.")
    for name, parameter in model.named_parameters():
        if f"{_COMPILED}." in name:
            raise LayershareError(f"Parts of the {what} are compiled ('{name}'): give the model as it was loaded.")
        kind = type(parameter.data)
        if kind is not torch.Tensor:
            raise LayershareError(
                f"'{name}' of the {what} is a {kind.__name__}, quantized or spread over several devices: load it as "
                "ordinary tensors."
            )
        if not parameter.is_floating_point():
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise LayershareError(f"'{name}' of the {what} is quantized ({dtype}): load the unquantized weights.")
        if weights and parameter.is_meta:
            raise LayershareError(f"The {what} {_ABSENT}: load it without a device map, into memory.")
    return model


def require_runnable(model: Any, *, what: str = "model") -> None:
    """Raise `LayershareError` for what is no causal language model that runs as it is; compiled and adapted ones do."""
    inner = _inner_name(model)
    if inner is not None and inner != _COMPILED:
        raise _wrapped(model, inner, what)
    inside = _require_causal(_inside(model), what)
    if inside.device.type == "meta":
        raise LayershareError(f"The {what} {_ABSENT}: load it into memory, at least its embeddings.")


def _inner_name(model: Any) -> str | None:
    """Under what name a wrapper (of torch.compile, of DataParallel and its kin) holds the model; `None` for none."""
    if isinstance(model, PreTrainedModel) or not isinstance(model, nn.Module):
        return None
    return next((name for name in (_COMPILED, "module") if isinstance(getattr(model, name, None), nn.Module)), None)


def _wrapped(model: nn.Module, inner: str, what: str) -> LayershareError:
    return LayershareError(f"The {what} is wrapped ({type(model).__name__}): give what is inside, its `.{inner}`.")


def _inside(model: Any) -> Any:
    """The model inside of all wrappers, PEFT's among them."""
    if isinstance(model, nn.Module) and hasattr(model, "get_base_model"):
        return model.get_base_model()  # pyright: ignore[reportCallIssue]
    inner = _inner_name(model)
    return model if inner is None else _inside(getattr(model, inner))


def _require_causal(model: Any, what: str) -> PreTrainedModel:
    if isinstance(model, str | Path):
        raise LayershareError(f"The {what} is a name, '{model}': load it with {_PLAIN} and give what that returns.")
    if not isinstance(model, PreTrainedModel):
        inner = "; give its `.model`" if isinstance(getattr(model, "model", None), PreTrainedModel) else ""
        raise LayershareError(
            f"The {what} must be a causal language model of transformers, as {_PLAIN} returns it, and not a "
            f"{type(model).__name__}{inner}."
        )
    if not model.can_generate():
        raise LayershareError(f"A {type(model).__name__} does not predict next tokens: load the {what} with {_PLAIN}.")
    return model


def _has_adapters(model: nn.Module) -> bool:
    return any(type(module).__module__.startswith("peft.") for module in model.modules())
