"""What calibration measures, above all one Gram per site: saved layer by layer, reused by all methods and sizes."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Collection
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from layershare.calibrate.backward import Trail
from layershare.calibrate.measures import Changes, GradientGrams, InputGrams, Measure, SquaredGradients, site_modules
from layershare.calibrate.stream import Stream
from layershare.calibrate.text import Text
from layershare.errors import LayershareError
from layershare.model.arch import PARTS, Linear, Part, Spec
from layershare.model.modes import evaluating
from layershare.model.weights import Weights, require_finite
from layershare.progress import Progress, no_progress
from layershare.store import MANIFEST, Store, only_one, read_manifest

BACKWARD = 2
"""Passes forwards that a way back takes as long as."""

Statistic = Literal["inputs", "blocks", "gradients", "fisher"]
"""`inputs`: a Gram and mean magnitudes per site; `blocks`: how much each block and sub-layer changes the hidden states;
`gradients`: a Gram of the loss's gradients at the output of each linear (a forward and a backward pass); `fisher`:
squared gradients per row of each weight (needs the whole model in memory)."""
STREAMED: tuple[Statistic, ...] = ("inputs", "blocks")
"""What one pass, block after block, measures."""
_TRIAL = "trial-"


class Stats:
    """What was measured of a model on a text, one file per kind and layer.

    `identity` names model and text; each has a folder of its own in `folder`. Damaged files count as not there.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self._store = Store(self.place(folder, identity), identity)

    @staticmethod
    def place(folder: Path, identity: dict[str, Any]) -> Path:
        """The folder in `folder` for one model and text."""
        return folder / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def find(cls, folder: Path, fingerprint: str) -> "Stats":
        """The statistics of a model in a folder. Raises `LayershareError` if there are none, or of several texts."""
        found = []
        for manifest in sorted(folder.glob(f"*/{MANIFEST}")):
            identity = read_manifest(manifest).get("identity", {})
            if identity.get("model") == fingerprint:
                found.append(identity)
        if len(found) != 1:
            raise LayershareError(
                f"'{folder}' holds statistics of this model on {len(found)} texts, where one is needed; "
                "name another folder or make them with `layershare calibrate`."
            )
        return cls(folder, found[0])

    def has(self, kind: Statistic, layer: int) -> bool:
        """Whether a layer's statistics of a kind are there, whole and unchanged."""
        return _unit(kind, layer) in self._store

    def require(self, kinds: Collection[Statistic], n_layers: int) -> None:
        """Raise `LayershareError` for kinds that were not measured of all layers."""
        for kind in sorted(kinds):
            if not all(self.has(kind, layer) for layer in range(n_layers)):
                raise LayershareError(
                    f"The statistics have no {kind} of some layers; measure them with `layershare calibrate`, which "
                    "has an option for each kind."
                )

    def gram(self, linear: Linear) -> Tensor:
        """G = XᵀX of a linear's input (d_in × d_in, float32), summed over all tokens."""
        return self._store.read(_unit("inputs", linear.layer), linear.site)

    def magnitude(self, linear: Linear) -> Tensor:
        """The mean of |x| of a linear's input (d_in, float32) over all tokens."""
        return self._store.read(_unit("inputs", linear.layer), f"{linear.site}.magnitude")

    def fisher(self, linear: Linear) -> Tensor:
        """Σⱼ E[(∂L/∂W)²ᵢⱼ] (d_in, float32), L the mean loss of one block of the text."""
        return self._store.read(_unit("fisher", linear.layer), linear.name)

    def gradient_gram(self, linear: Linear) -> Tensor:
        """Γ, the mean of gᵀg over tokens (d_out × d_out, float32), g the gradient of Σ −log p at a linear's output."""
        return self._store.read(_unit("gradients", linear.layer), linear.name)

    @property
    def tokens(self) -> int:
        """Tokens of the text, which Grams of inputs are summed over."""
        text = self._store.identity["text"]
        return text["blocks"] * text["length"]

    def cosines(self, layer: int) -> dict[Part, float]:
        """The mean cosine, over all tokens, between what enters a block or sub-layer and what leaves it."""
        values = self._store.read(_unit("blocks", layer), "cosines").tolist()
        return dict(zip((*PARTS, "block"), values, strict=True))

    def pooled(self, layer: int) -> Tensor:
        """The hidden state of each text block's last token (n × width, float32) when it leaves this layer."""
        return self._store.read(_unit("blocks", layer), "pooled")

    @property
    def trials(self) -> list[tuple[float, float]]:
        """Of plans that were carried out: the predicted loss, and the KL divergence on held-out text."""
        facts = [self._store.facts(unit) for unit in self._store if unit.startswith(_TRIAL)]
        return sorted((each["predicted"], each["kl"]) for each in facts)

    def tried(self, keep: float) -> bool:
        """Whether the plan of this size is among them."""
        return f"{_TRIAL}{keep}" in self._store

    def write_trial(self, keep: float, predicted: float, kl: float) -> None:
        """Note what a plan of this size was predicted to lose and what it lost, in nats per token."""
        with only_one(self._store.folder, wait=True):
            self._store = Store(self._store.folder, self._store.identity)  # with what others have added
            self._store.write(f"{_TRIAL}{keep}", {}, {"predicted": predicted, "kl": kl})

    def derived(self, layer: int, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """What this version computes from a layer's statistics and weights under a name, kept beside them.

        One process computes at a time, and others wait for it. Nothing is kept in a folder that cannot be written to.
        """
        if not os.access(self._store.folder, os.W_OK):
            return compute()
        folder = self._store.folder / "derived" / f"{layer:03d}"
        with only_one(folder, wait=True):
            store = Store(folder, {**self._store.identity, "layershare": version("layershare")})
            if name not in store:
                store.write(name, {"value": compute()})
            return store.read(name, "value").clone()

    def write(self, kind: Statistic, layer: int, measure: Measure) -> None:
        """Finish a layer's statistics of a kind and store them. Raises `LayershareError` as `Measure.finish` does."""
        self._store.write(_unit(kind, layer), measure.finish())


def _unit(kind: Statistic, layer: int) -> str:
    return f"{kind}-{layer:03d}"


def calibrate(
    weights: Weights,
    spec: Spec,
    text: Text,
    folder: Path,
    *,
    batch_size: int,
    kinds: Collection[Statistic] = STREAMED,
    scratch: Path | None = None,
    progress: Progress = no_progress,
) -> Stats:
    """Measure statistics of the asked `kinds`: the streamed ones in one pass over the text, block after block.

    Every finished layer is stored in `folder`; the same call continues where an earlier one was stopped, and waits for
    another process that measures the same. In a folder that cannot be written to all of it must be there. With
    `scratch` the hidden states live in files there. Warns if the text has fewer tokens than a site is wide. Raises
    `LayershareError` if weights or activations contain NaN or infinity, naming the place, and for what is missing where
    nothing can be written.
    """
    identity = {"model": weights.fingerprint, "text": text.identity}
    place = Stats.place(folder, identity)
    if place.is_dir() and not os.access(place, os.W_OK):
        stats = Stats(folder, identity)
        stats.require(kinds, spec.n_layers)
        return stats
    with only_one(place, wait=True):
        stats = Stats(folder, identity)
        layers = range(spec.n_layers)
        if "fisher" in kinds and not all(stats.has("fisher", layer) for layer in layers):
            _through_the_whole(weights, spec, text, stats, progress)
        streamed: list[Statistic] = [kind for kind in STREAMED if kind in kinds]
        missing = [layer for layer in layers if not all(stats.has(kind, layer) for kind in streamed)]
        backwards = "gradients" in kinds and not all(stats.has("gradients", layer) for layer in layers)
        if not missing and not backwards:
            return stats
        if "inputs" in streamed:
            _warn_if_deficient(spec, text.tokens.numel())
        stream = Stream(weights, text.tokens, batch_size, scratch)
        trail = Trail(stream)
        last = spec.n_layers - 1 if backwards else missing[-1]
        steps = last + 1 + BACKWARD * spec.n_layers * backwards
        for layer, block in stream:
            progress(layer, steps)
            if backwards:
                trail.keep()
            if layer in missing:
                require_finite(block.named_parameters(weights.block_name(layer)))
                made = _streamed(spec, layer, len(text.tokens))
                measures: dict[Statistic, Measure] = {x: made[x] for x in streamed if not stats.has(x, layer)}
                with ExitStack() as attached:
                    for measure in reversed(measures.values()):  # the copy that `Changes` makes is not to be watched
                        attached.enter_context(measure.attach(block))
                    stream.run()
                for kind, measure in measures.items():
                    stats.write(kind, layer, measure)
            if layer == last:
                break
        if backwards:
            _back(trail, spec, stats, lambda done: progress(spec.n_layers + BACKWARD * done, steps))
        progress(steps, steps)
        return stats


def _streamed(spec: Spec, layer: int, rows: int) -> dict[Statistic, Measure]:
    """What can be measured of a layer while a text of so many rows passes through its block."""
    mlp = [spec.within(layer, linear.name) for linear in spec.part(layer, "mlp")]
    return {
        "inputs": InputGrams(site_modules(spec, layer), magnitudes=True),
        "blocks": Changes(spec.block(layer), mlp, rows),
    }


def _back(trail: Trail, spec: Spec, stats: Stats, done: Callable[[int], None]) -> None:
    """Measure the gradients of every layer, last one first."""
    for layer, block in trail.back():
        done(spec.n_layers - 1 - layer)
        if stats.has("gradients", layer):
            trail.run()
            continue
        measure = GradientGrams({spec.within(layer, x.name): x.name for x in spec.linears if x.layer == layer})
        with measure.attach(block):
            trail.run()
        stats.write("gradients", layer, measure)


def _through_the_whole(weights: Weights, spec: Spec, text: Text, stats: Stats, progress: Progress) -> None:
    """Measure squared gradients of all layers at once: the whole model is in memory, and sees one block at a time."""
    model = weights.whole()
    blocks, length = text.tokens.shape
    measures = []
    for layer in range(spec.n_layers):
        own = {spec.weight_name(linear): linear for linear in spec.linears if linear.layer == layer}
        measures.append(SquaredGradients(own, blocks, length - 1))
    with ExitStack() as attached, evaluating(model), torch.enable_grad():
        for measure in measures:
            attached.enter_context(measure.attach(model))
        for done, block in enumerate(text.tokens):
            progress(done, blocks)
            tokens = block[None].to(weights.device)
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
            cross_entropy(logits.float(), tokens[0, 1:], reduction="sum").backward()
    progress(blocks, blocks)
    for layer, measure in enumerate(measures):
        stats.write("fisher", layer, measure)


def _warn_if_deficient(spec: Spec, tokens: int) -> None:
    widest = max(spec.linears, key=lambda linear: linear.d_in)
    if tokens < widest.d_in:
        warnings.warn(
            f"The text has {tokens} tokens, fewer than the {widest.d_in} inputs of '{widest.site}': its Gram matrix is "
            "rank-deficient, so directions that the text does not show are lost. Give more blocks.",
            stacklevel=3,
        )
