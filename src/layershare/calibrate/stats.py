"""What calibration measures: one Gram matrix per site, saved layer by layer, reused by all methods and sizes."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layershare.calibrate.stream import Stream
from layershare.calibrate.text import Text
from layershare.errors import LayershareError
from layershare.model.arch import Linear, Spec
from layershare.model.weights import Weights, require_finite
from layershare.store import Store

Progress = Callable[[int, int], None]
"""Called with the amount of work done and the amount there is."""
_ROWS = 512
"""Tokens that are widened to float32 at once."""


class Stats:
    """Gram matrices G = XᵀX (d_in × d_in, float32) of every site of a model on a text, one file per layer.

    `identity` names model and text; each has a folder of its own in `folder`. Damaged files count as not there.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._store = Store(folder / digest[:16], identity)

    def has(self, layer: int) -> bool:
        """Whether a layer's Grams are there, whole and unchanged."""
        return f"layer-{layer:03d}" in self._store

    def gram(self, linear: Linear) -> Tensor:
        """The Gram of a linear's input, summed over all tokens."""
        return self._store.read(f"layer-{linear.layer:03d}", linear.site)

    def write(self, layer: int, grams: dict[str, Tensor]) -> None:
        """Store a layer's Grams by site."""
        self._store.write(f"layer-{layer:03d}", grams)


def calibrate(
    weights: Weights,
    spec: Spec,
    text: Text,
    folder: Path,
    *,
    batch_size: int,
    scratch: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Stats:
    """Measure the Grams of all sites in one pass over the text, block after block.

    Every finished layer is stored in `folder`; the same call continues where an earlier one was stopped. With
    `scratch` the hidden states live in files there. Warns if the text has fewer tokens than a site is wide. Raises
    `LayershareError` if weights or activations contain NaN or infinity, naming the place.
    """
    stats = Stats(folder, {"model": weights.fingerprint, "text": text.identity})
    missing = [layer for layer in range(spec.n_layers) if not stats.has(layer)]
    if not missing:
        return stats
    _warn_if_deficient(spec, text.tokens.numel())
    stream = Stream(weights, text.tokens, batch_size, scratch)
    for layer, block in stream:
        progress(layer, missing[-1] + 1)
        if layer in missing:
            require_finite(block.named_parameters(weights.block_name(layer)))
            with measuring(block, site_modules(spec, layer)) as grams:
                stream.run()
            stats.write(layer, grams)
        if layer == missing[-1]:
            break
    progress(missing[-1] + 1, missing[-1] + 1)
    return stats


def site_modules(spec: Spec, layer: int) -> dict[str, str]:
    """Site -> the name, within its block, of the module whose input it is."""
    start = len(f"{spec.blocks}.{layer}.")
    return {linear.site: linear.site[start:] for linear in spec.linears if linear.layer == layer}


@contextmanager
def measuring(block: nn.Module, sites: dict[str, str]) -> Iterator[dict[str, Tensor]]:
    """Within this context, Grams (float32, by site) of the inputs of the named modules add up in what it yields.

    Raises `LayershareError` at the end if a Gram is not finite.
    """
    grams: dict[str, Tensor] = {}

    def watch(site: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            if site not in grams:
                grams[site] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            for rows in x.split(_ROWS):
                wide = rows.float()
                grams[site].addmm_(wide.T, wide)

        return add

    hooks = [block.get_submodule(name).register_forward_pre_hook(watch(site)) for site, name in sites.items()]
    try:
        yield grams
    finally:
        for hook in hooks:
            hook.remove()
    _require_finite_grams(grams.items())


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
