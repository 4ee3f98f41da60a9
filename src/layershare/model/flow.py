"""A forward recorded as steps between values.

A module without children is one step, every operation outside of such modules another.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_SAME = {"view", "_unsafe_view", "alias", "detach", "expand", "unsqueeze", "squeeze", "_to_copy", "clone", "slice"}
"""Operations whose result, if it has as many elements, is the value that it was made from."""


@dataclass(frozen=True)
class Step:
    """Something that made a value: a module (by its full name) or an operation (`add`), from which values.

    What no step made, such as a parameter, comes from a step "a tensor". `scalars` are the numbers among an operation's
    arguments, NaN where a tensor of one element stands for one.
    """

    name: str
    inputs: tuple[int, ...]
    output: int
    scalars: tuple[float, ...] = ()
    module: nn.Module | None = None


class Flow(TorchDispatchMode):
    """Records the steps of a forward; values are numbered, a view or a cast of a tensor is the same value."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._values: dict[int, int] = {}
        self._alive: list[Tensor] = []  # a freed tensor's id could be taken by another
        self._inside: set[int] | None = None

    @contextmanager
    def watching(self, model: nn.Module):
        """Record what the modules of `model` do within this context."""
        hooks = []
        for name, module in model.named_modules():
            if not list(module.children()):
                hooks.append(module.register_forward_pre_hook(self._enter))
                hooks.append(module.register_forward_hook(self._leaver(name)))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        nested = (arg if isinstance(arg, list | tuple) else (arg,) for arg in (*args, *(kwargs or {}).values()))
        given = [item for items in nested for item in items]
        tensors = [item for item in given if isinstance(item, Tensor)]
        if self._inside is not None:
            self._inside.update(self._values[id(tensor)] for tensor in tensors if id(tensor) in self._values)
            return result
        scalars = [float(item) for item in given if isinstance(item, int | float)]
        scalars += [math.nan for tensor in tensors if tensor.numel() == 1]
        tensors = [tensor for tensor in tensors if tensor.numel() > 1]
        for tensor in tensors:
            if id(tensor) not in self._values:
                self._record("a tensor", (), tensor)
        inputs = tuple(self._values[id(tensor)] for tensor in tensors)
        name = func.name().removeprefix("aten::").partition(".")[0]
        made = result if isinstance(result, list | tuple) else (result,)
        for tensor in (item for item in made if isinstance(item, Tensor)):
            if name in _SAME and len(inputs) == 1 and tensor.numel() == tensors[0].numel():
                self._set(tensor, inputs[0])
            else:
                self._record(name, inputs, tensor, tuple(scalars))
        return result

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._inside = set()

    def _leaver(self, name: str):
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            used, self._inside = tuple(sorted(self._inside or ())), None
            for tensor in output if isinstance(output, list | tuple) else (output,):
                if isinstance(tensor, Tensor) and id(tensor) not in self._values:  # dropout hands on what it is given
                    self._record(name, used, tensor, module=module)

        return leave

    def _record(
        self,
        name: str,
        inputs: tuple[int, ...],
        output: Tensor,
        scalars: tuple[float, ...] = (),
        module: nn.Module | None = None,
    ) -> None:
        self.steps.append(Step(name, inputs, len(self.steps), scalars, module))
        self._set(output, len(self.steps) - 1)

    def _set(self, tensor: Tensor, value: int) -> None:
        self._alive.append(tensor)
        self._values[id(tensor)] = value
