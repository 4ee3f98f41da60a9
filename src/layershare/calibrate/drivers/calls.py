"""How a block is called and what it returns: the hidden states among its arguments and outputs."""

from typing import Any

from torch import Tensor

from layershare.errors import UnsupportedModelError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments."""


def hidden_input(call: Call) -> Tensor:
    """The hidden states among a block's arguments: the first positional one, or the keyword `hidden_states`."""
    args, kwargs = call
    states = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(states, Tensor):
        raise UnsupportedModelError("The model's blocks take no hidden states as their first argument.")
    return states


def with_hidden_input(call: Call, states: Tensor | None) -> Call:
    """The arguments with other hidden states."""
    args, kwargs = call
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


def hidden_output(output: Any) -> Tensor:
    """The hidden states in a block's output: the output itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden_output(output: Any, states: Tensor | None) -> Any:
    """The output with other hidden states."""
    return (states, *output[1:]) if isinstance(output, tuple) else states
