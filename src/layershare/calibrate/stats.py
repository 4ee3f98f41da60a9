"""What calibration measures, above all one Gram per site: saved layer by layer, reused by all methods and sizes."""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from layershare.calibrate.backward import Trail
from layershare.calibrate.drivers import hidden_input, hidden_output
from layershare.calibrate.stream import Stream
from layershare.calibrate.text import Text
from layershare.errors import LayershareError
from layershare.model.arch import PARTS, Linear, Part, Spec
from layershare.model.dropped import without_mlp
from layershare.model.modes import evaluating
from layershare.model.weights import Weights, require_finite
from layershare.progress import Progress, no_progress
from layershare.store import MANIFEST, Store, only_one, read_manifest

_ROWS = 256
"""Tokens that are widened to float32 at once."""

BACKWARD = 2
"""Passes forwards that a way back takes as long as."""

Statistic = Literal["inputs", "blocks", "gradients", "fisher"]
"""`inputs`: a Gram and mean magnitudes per site; `blocks`: how much each block and sub-layer changes the hidden states;
`gradients`: a Gram of the loss's gradients at the output of each linear (a forward and a backward pass); `fisher`:
squared gradients per row of each weight (needs the whole model in memory)."""
STREAMED: tuple[Statistic, ...] = ("inputs", "blocks")
"""What one pass, block after block, measures."""


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

    def write(self, kind: Statistic, layer: int, tensors: dict[str, Tensor]) -> None:
        """Store a layer's statistics of a kind."""
        self._store.write(_unit(kind, layer), tensors)


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
    another process that measures the same. With `scratch` the hidden states live in files there. Warns if the text has
    fewer tokens than a site is wide. Raises `LayershareError` if weights or activations contain NaN or infinity, naming
    the place.
    """
    identity = {"model": weights.fingerprint, "text": text.identity}
    with only_one(Stats.place(folder, identity), wait=True):
        stats = Stats(folder, identity)
        if "fisher" in kinds:
            _measure_fisher(weights, spec, text, stats, progress)
        streamed: list[Statistic] = [kind for kind in STREAMED if kind in kinds]
        missing = [layer for layer in range(spec.n_layers) if not all(stats.has(kind, layer) for kind in streamed)]
        backwards = "gradients" in kinds and not all(stats.has("gradients", layer) for layer in range(spec.n_layers))
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
                wants_inputs = "inputs" in streamed and not stats.has("inputs", layer)
                with measuring(block, site_modules(spec, layer) if wants_inputs else {}, magnitudes=True) as measured:
                    stream.run()
                if wants_inputs:
                    stats.write("inputs", layer, measured)
                if "blocks" in streamed and not stats.has("blocks", layer):
                    stats.write("blocks", layer, _change(stream, spec, layer, block))
            if layer == last:
                break
        if backwards:
            _measure_gradients(trail, spec, stats, lambda done: progress(spec.n_layers + BACKWARD * done, steps))
        progress(steps, steps)
        return stats


def _measure_gradients(trail: Trail, spec: Spec, stats: Stats, done: Callable[[int], None]) -> None:
    """Store the Grams of gradients of every layer, last one first. Raises `LayershareError` if one is not finite."""
    inside = {layer: {} for layer in range(spec.n_layers)}  # name within the block -> full name
    for linear in spec.linears:
        inside[linear.layer][linear.name.removeprefix(f"{spec.blocks}.{linear.layer}.")] = linear.name
    for layer, batches in trail.back(inside.__getitem__):
        done(spec.n_layers - 1 - layer)
        grams: dict[str, Tensor] = {}
        seen = Counter()  # tokens
        for gradients in batches:
            for inner, gradient in gradients.items():
                name, width = inside[layer][inner], gradient.shape[1]
                if name not in grams:
                    grams[name] = torch.zeros(width, width, device=gradient.device)
                for _ in _add_to_gram(grams[name], gradient):
                    pass
                seen[name] += len(gradient)
        for name, gram in grams.items():
            if not gram.diagonal().isfinite().all():
                raise LayershareError(f"The gradients of '{name}' overflow; run the model in a wider dtype.")
        if not stats.has("gradients", layer):
            stats.write("gradients", layer, {name: gram / seen[name] for name, gram in grams.items()})


def site_modules(spec: Spec, layer: int) -> dict[str, str]:
    """Site -> the name, within its block, of the module whose input it is."""
    start = len(f"{spec.blocks}.{layer}.")
    return {linear.site: linear.site[start:] for linear in spec.linears if linear.layer == layer}


@contextmanager
def measuring(block: nn.Module, sites: dict[str, str], *, magnitudes: bool = False) -> Iterator[dict[str, Tensor]]:
    """Within this context, Grams (float32, by site) of the inputs of the named modules add up in what it yields.

    With `magnitudes` it holds afterwards also the mean of |x| (d_in) under `SITE.magnitude`. Raises `LayershareError`
    at the end if a Gram is not finite.
    """
    measured: dict[str, Tensor] = {}
    rows_seen = dict.fromkeys(sites, 0)

    def watch(site: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            if site not in measured:
                measured[site] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
                if magnitudes:
                    measured[f"{site}.magnitude"] = torch.zeros(x.shape[1], device=x.device)
            for wide in _add_to_gram(measured[site], x):
                if magnitudes:
                    measured[f"{site}.magnitude"] += torch.linalg.vector_norm(wide, 1, dim=0)
            rows_seen[site] += len(x)

        return add

    hooks = [block.get_submodule(name).register_forward_pre_hook(watch(site)) for site, name in sites.items()]
    try:
        yield measured
    finally:
        for hook in hooks:
            hook.remove()
    _require_finite_grams((site, measured[site]) for site in sites)
    if magnitudes:
        for site, rows in rows_seen.items():
            measured[f"{site}.magnitude"] /= rows


def gram_of(batches: Iterable[Tensor]) -> Tensor:
    """XᵀX (float32) of tensors [..., d], of which there is at least one."""
    gram = None
    for batch in batches:
        x = batch.reshape(-1, batch.shape[-1])
        gram = torch.zeros(x.shape[1], x.shape[1], device=x.device) if gram is None else gram
        for _ in _add_to_gram(gram, x):
            pass
    assert gram is not None
    return gram


def _add_to_gram(gram: Tensor, x: Tensor) -> Iterator[Tensor]:
    """Add XᵀX of x [n, d], and give x in float32, some rows at a time."""
    for rows in x.split(_ROWS):
        wide = rows.float()
        gram.addmm_(wide.T, wide)
        yield wide


@torch.no_grad()
def _change(stream: Stream, spec: Spec, layer: int, block: nn.Module) -> dict[str, Tensor]:
    """What a block that has just been run does to the hidden states, as the statistics of kind `blocks`.

    The hidden states between attention and MLP are the block's output without its MLP (in a block that runs the two in
    parallel, with the attention's contribution alone). Raises `LayershareError` if hidden states are not finite.
    """
    start = len(f"{spec.blocks}.{layer}.")
    total, pooled = torch.zeros(3, dtype=torch.float64), []
    with without_mlp(block, [linear.name[start:] for linear in spec.part(layer, "mlp")]), evaluating(block):
        for batch in range(len(stream.batches)):
            entering = hidden_input(stream.call(batch)).float()
            args, kwargs = stream.call(batch)
            between = hidden_output(block(*args, **kwargs)).float()
            leaving = stream.batches.rows(stream.outputs, batch).to(between.device).float()
            for i, (before, after) in enumerate(((entering, between), (between, leaving), (entering, leaving))):
                total[i] += torch.cosine_similarity(before, after, dim=-1).sum().item()
            pooled.append(leaving[:, -1].cpu())
    if not total.isfinite().all():
        raise LayershareError(
            f"The hidden states of '{spec.blocks}.{layer}' overflow or contain NaN on this text; run the model in a "
            "wider dtype."
        )
    return {"cosines": total / stream.batches.tokens.numel(), "pooled": torch.cat(pooled)}


def _measure_fisher(weights: Weights, spec: Spec, text: Text, stats: Stats, progress: Progress) -> None:
    """Back-propagate the loss of every block of text and add up squared gradients, one gradient at a time in memory.

    Never of several blocks at once: the square of their mean gradient would depend on the batch size. The loss is
    summed over the tokens and divided by their number afterwards, so that float16 holds the gradients.
    """
    if all(stats.has("fisher", layer) for layer in range(spec.n_layers)):
        return
    model = weights.whole()
    sums = {linear: torch.zeros(linear.d_in, device=weights.device) for linear in spec.linears}

    def watch(linear: Linear) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            sums[linear] += weight.grad.float().square().sum(1 if linear.conv1d else 0)
            weight.grad = None

        return add

    for linear in spec.linears:
        weight = model.get_parameter(spec.weight_name(linear)).requires_grad_()
        weight.register_post_accumulate_grad_hook(watch(linear))
    with evaluating(model), torch.enable_grad():
        for done, block in enumerate(text.tokens):
            progress(done, len(text.tokens))
            tokens = block[None].to(weights.device)
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
            cross_entropy(logits.float(), tokens[0, 1:], reduction="sum").backward()
    progress(len(text.tokens), len(text.tokens))
    for linear, total in sums.items():
        if not total.isfinite().all():
            raise LayershareError(f"The gradients of '{linear.name}' overflow; run the model in a wider dtype.")
    blocks, length = text.tokens.shape
    for layer in range(spec.n_layers):
        own = [linear for linear in spec.linears if linear.layer == layer]
        stats.write("fisher", layer, {x.name: sums[x] / blocks / (length - 1) ** 2 for x in own})


def _require_finite_grams(grams: Iterable[tuple[str, Tensor]]) -> None:
    for site, gram in grams:
        if not gram.diagonal().isfinite().all():
            raise LayershareError(
                f"The inputs of '{site}' overflow or contain NaN on this text; run the model in a wider dtype."
            )


def _warn_if_deficient(spec: Spec, tokens: int) -> None:
    widest = max(spec.linears, key=lambda linear: linear.d_in)
    if tokens < widest.d_in:
        warnings.warn(
            f"The text has {tokens} tokens, fewer than the {widest.d_in} inputs of '{widest.site}': its Gram matrix is "
            "rank-deficient, so directions that the text does not show are lost. Give more blocks.",
            stacklevel=3,
        )
