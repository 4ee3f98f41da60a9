"""Find out whether a model is a plain pre-norm decoder: from the flow of data, not from its name.

A plain pre-norm decoder adds up embeddings, then twice per block x ← x + m·write(f(read(norm(x)))), and reads the last
x through a norm and the head; nothing else may touch x. That is read off the steps of the one run on shapes that
`describe` makes.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from layershare.model.flow import Flow, Step
from layershare.model.norms import UnknownNorm, norm_kind

_PARALLEL = "it runs attention and MLP side by side"


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
        try:
            kinds = {norm_kind(norm.module, head.in_features) for norm in norms if norm.module is not None}
        except UnknownNorm as error:
            raise NotPreNorm(str(error)) from error
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
