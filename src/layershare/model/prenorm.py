"""Find out whether a model is a plain pre-norm decoder: from the flow of data, not from its name.

A plain pre-norm decoder adds up embeddings, then twice per block x ← x + m·write(f(read(norm(x)))), and reads the last
x through a norm and the head; nothing else may touch x. The one run on shapes that `describe` makes is recorded as
steps between values: a module without children is one step, every operation outside of such modules another. What
kind of norm a module is, it is asked by numbers.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

_SAME = {"view", "_unsafe_view", "alias", "detach", "expand", "unsqueeze", "squeeze", "_to_copy", "clone", "slice"}
"""Operations whose result, if it has as many elements, is the value that it was made from."""
_PARALLEL = "it runs attention and MLP side by side"
_LARGE, _SMALL = 2.0**20, 2.0**-10
"""Sizes of probing inputs for which a norm's ε is negligible, and is not."""


@dataclass(frozen=True)
class SubLayer:
    """One sub-layer x ← x + m·write(f(read(norm(x)))) by module names; `multiplier` is m, 1 in most families."""

    norm: str
    readers: tuple[str, ...]
    writer: str
    multiplier: float = 1.0


@dataclass(frozen=True)
class PreNorm:
    """The residual stream of a plain pre-norm decoder; module names are relative to the base model, but for the head's.

    `width`: of the stream (D). `embeddings`: the modules whose outputs it starts as the sum of. `sublayers`: attention
    and MLP of every block, in order. `centered`: the norms subtract the mean (LayerNorm); `shifted`: they add a bias;
    `eps`: what they add to the mean square. `vocabulary`: rows of the head.
    """

    width: int
    embeddings: tuple[str, ...]
    sublayers: tuple[SubLayer, ...]
    final_norm: str
    head: str
    vocabulary: int
    centered: bool
    shifted: bool
    eps: float


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


class NotPreNorm(Exception):
    """The model is not a plain pre-norm decoder; the message goes on from "because"."""


def find_prenorm(flow: Flow, prefix: str, parts: Sequence[tuple[Sequence[str], str]], head: nn.Module) -> PreNorm:
    """The residual stream in a recorded forward.

    `prefix` leads to the base model; `parts` lists the readers and the writer of every sub-layer in order, by full
    names; `head` is the output head. Raises `NotPreNorm`.
    """
    return _Search(flow.steps, prefix).run(parts, head)


class _Search:
    """The steps of a forward by name and by what they use."""

    def __init__(self, steps: Sequence[Step], prefix: str) -> None:
        self.steps, self.prefix = steps, prefix
        self.of = {step.name: step for step in steps if step.module is not None}
        self.calls = Counter(step.name for step in steps if step.module is not None)
        self.users: dict[int, list[Step]] = {}
        for step in steps:
            for value in set(step.inputs):
                self.users.setdefault(value, []).append(step)

    def run(self, parts: Sequence[tuple[Sequence[str], str]], head: nn.Module) -> PreNorm:
        """Follow the stream from the embeddings to the head."""
        sublayers: list[SubLayer] = []
        norms: list[Step] = []
        stream = first = None
        self.linears = {name for readers, _ in parts for name in readers}
        for readers, writer in parts:
            norm = self._norm_before(readers)
            if stream is None:
                stream = first = norm.inputs[0]
            if norm.inputs[0] != stream:
                raise NotPreNorm(
                    _PARALLEL
                    if norm.inputs[0] in (norms[-1].inputs[0], first)
                    else "something stands between its sub-layers"
                )
            multiplier, added = self._added(writer, stream)
            self._require_users(stream, [norm, added])
            norms.append(norm)
            for name in (norm.name, *readers, writer):
                if self.calls[name] > 1:
                    raise NotPreNorm(f"'{name}' is called {self.calls[name]} times")
            sublayers.append(
                SubLayer(self._base(norm.name), tuple(map(self._base, readers)), self._base(writer), multiplier)
            )
            stream = added.output
        assert stream is not None
        assert first is not None
        last = self.users.get(stream, [])
        if len(last) != 1 or last[0].module is None:
            raise NotPreNorm("its last hidden states are not read by one norm alone")
        norms.append(last[0])
        readers = self.users.get(last[0].output, [])
        if len(readers) != 1 or readers[0].module is not head or not isinstance(head, nn.Linear):
            raise NotPreNorm("its last norm is not read by a linear output head alone")
        kinds = {norm_kind(norm.module, head.in_features) for norm in norms if norm.module is not None}
        if len(kinds) != 1:
            raise NotPreNorm("its norms are of several kinds")
        centered, shifted, eps = kinds.pop()
        return PreNorm(
            width=head.in_features,
            embeddings=tuple(self._base(name) for name in self._embeddings(first)),
            sublayers=tuple(sublayers),
            final_norm=self._base(last[0].name),
            head=readers[0].name,
            vocabulary=head.out_features,
            centered=centered,
            shifted=shifted,
            eps=eps,
        )

    def _base(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def _norm_before(self, readers: Sequence[str]) -> Step:
        """The module whose output the readers, and nothing else, read."""
        values = {self.of[name].inputs for name in readers}
        if len(values) != 1:
            raise NotPreNorm(f"'{readers[0]}' and its neighbours read different hidden states")
        ((value, *_),) = values
        norm = self.steps[value]
        if norm.module is None or isinstance(norm.module, nn.Embedding) or len(norm.inputs) != 1:
            raise NotPreNorm(f"no norm stands directly before '{readers[0]}' (post-norms)")
        others = [step.name for step in self.users[value] if step.name not in readers]
        if set(others) & self.linears:
            raise NotPreNorm(_PARALLEL)
        if others:
            raise NotPreNorm(f"'{others[0]}' reads the normed hidden states besides '{readers[0]}'")
        return norm

    def _added(self, writer: str, stream: int) -> tuple[float, Step]:
        """The step that adds what a writer puts out to the stream, and what that is multiplied by before."""
        made, multiplier = self.of[writer], 1.0
        step = self._only_user(made)
        if step.name == "mul" and len(step.inputs) == 1 and len(step.scalars) == 1:
            multiplier, made, step = step.scalars[0], step, self._only_user(step)
        if step.module is not None:
            raise NotPreNorm(f"'{step.name}' norms what its sub-layers write (sandwich or post-norms)")
        if step.name not in ("add", "add_") or step.scalars or multiplier == 0 or math.isnan(multiplier):
            raise NotPreNorm(f"what '{writer}' writes is not simply added to the hidden states")
        if set(step.inputs) != {stream, made.output}:
            raise NotPreNorm(_PARALLEL)
        return multiplier, step

    def _only_user(self, made: Step) -> Step:
        users = self.users.get(made.output, [])
        if len(users) != 1:
            raise NotPreNorm(f"what '{made.name}' puts out is used {len(users)} times")
        return users[0]

    def _require_users(self, stream: int, expected: list[Step]) -> None:
        for step in self.users[stream]:
            if step not in expected:
                if step.name in ("add", "add_"):
                    raise NotPreNorm(_PARALLEL)
                raise NotPreNorm(f"'{step.name}' reads the hidden states besides the norms")

    def _embeddings(self, value: int) -> list[str]:
        """The embeddings that a value is the sum of, each of them perhaps times a number."""
        step = self.steps[value]
        if isinstance(step.module, nn.Embedding):
            return [step.name]
        linear = (step.name == "add" and not step.scalars) or (step.name == "mul" and len(step.inputs) == 1)
        if step.module is None and linear and step.inputs:
            return [name for each in step.inputs for name in self._embeddings(each)]
        raise NotPreNorm(f"'{step.name}' stands between its embeddings and its first block")


@torch.no_grad()
def norm_kind(module: nn.Module, width: int) -> tuple[bool, bool, float]:
    """Whether a norm subtracts the mean and adds a bias, and its ε; found by asking it, its weights made up.

    Raises `NotPreNorm` if it computes something else than RMSNorm or LayerNorm.
    """
    draw = torch.Generator().manual_seed(0)
    made_up = {
        name: torch.rand(parameter.shape, generator=draw, dtype=torch.float64) + 0.5
        for name, parameter in module.named_parameters()
    }
    x = torch.randn(width, generator=draw, dtype=torch.float64) + 1
    try:
        scale, shift = affine(module, made_up, width)
        small = (_ask(module, made_up, _SMALL * _unit(width)) - shift) * _unit(width)
        answer = _ask(module, made_up, x)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise NotPreNorm(f"its norm {type(module).__name__} has weights of its own kind") from error
    eps = float(f"{_SMALL**2 * max(((scale / small) ** 2).mean().item() - 1, 0):.3g}")
    for centered in (False, True):
        moved = x - x.mean() if centered else x
        expected = scale * moved / (moved.square().mean() + eps).sqrt() + shift
        if torch.allclose(answer, expected, rtol=1e-4, atol=1e-5):
            return centered, bool(shift.abs().max() > 1e-3), eps
    raise NotPreNorm(f"its norm {type(module).__name__} is neither RMSNorm nor LayerNorm")


@torch.no_grad()
def affine(module: nn.Module, parameters: Mapping[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Scale and shift (float64, `width` each) of a norm with these parameters, norm(x) = scale ⊙ x̂ + shift."""
    wide = {name: tensor.double() for name, tensor in parameters.items()}
    unit = _unit(width)
    shift = _ask(module, wide, 0 * unit)
    return (_ask(module, wide, _LARGE * unit) - shift) * unit, shift


def _ask(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    device = next((tensor.device for tensor in parameters.values()), x.device)
    return functional_call(module, dict(parameters), (x.to(device)[None, None],))[0, 0].double().cpu()


def _unit(width: int) -> Tensor:
    """An input of mean 0 and mean square 1: 1, −1, 1, −1, …"""
    return torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(math.ceil(width / 2))[:width]
