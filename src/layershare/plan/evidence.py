"""What a method may look at when it plans and solves: weights, measured statistics, and the text itself."""

import hashlib
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from layershare.calibrate.stats import Stats
from layershare.calibrate.stream import Stream
from layershare.calibrate.text import Text
from layershare.errors import LayershareError
from layershare.formulas.linalg import spectrum
from layershare.model.arch import Linear, Spec
from layershare.model.weights import Weights, require_finite
from layershare.plan.ranks import Group
from layershare.progress import Progress, no_progress


@dataclass(frozen=True)
class Evidence:
    """A model, its statistics and its calibration text, as far as they are there, and who is told of progress.

    The text passes through the model `batch_size` blocks at a time, hidden states being kept in files in `scratch` if
    one is given. Raises `LayershareError` where a method asks for what is not there.
    """

    spec: Spec
    opened: Weights | None = None
    measured: Stats | None = None
    calibration: Text | None = None
    spare: Text | None = None
    progress: Progress = no_progress
    batch_size: int = 1
    scratch: Path | None = None
    _known: dict[Hashable, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> Weights:
        """The weights."""
        if self.opened is None:
            raise LayershareError("This method plans by the weights; give it a model, not a config alone.")
        return self.opened

    @property
    def stats(self) -> Stats:
        """The statistics."""
        if self.measured is None:
            raise LayershareError("This method needs measured statistics; give it a text.")
        return self.measured

    @property
    def text(self) -> Text:
        """The calibration text."""
        if self.calibration is None:
            raise LayershareError("This method runs the model on a text; compress with one.")
        return self.calibration

    @property
    def held_out(self) -> Text:
        """Blocks of the same source that nothing is measured or fitted on, so that choices can be tried on them."""
        if self.spare is None:
            raise LayershareError("This needs blocks of text to try its choices on; give a longer text.")
        return self.spare

    def stream(self, *texts: Text) -> Stream:
        """The model, block after block, with texts passing through one after the other; without any, `text`."""
        tokens = torch.cat([each.tokens for each in texts or (self.text,)])
        return Stream(self.weights, tokens, self.batch_size, self.scratch)

    def weight(self, linear: Linear) -> Tensor:
        """The weight of a linear as W: d_in × d_out, on the device of `Weights`.

        Raises `LayershareError` if it is not finite.
        """
        name = self.spec.weight_name(linear)
        weight = self.weights.tensor(name)
        require_finite([(name, weight)])
        return linear.matrix(weight.to(self.weights.device))

    def gram(self, linear: Linear) -> Tensor:
        """G = XᵀX of a linear's inputs, d_in × d_in, summed over all tokens."""
        return self.stats.gram(linear).to(self.weights.device)

    def gradient_gram(self, linear: Linear) -> Tensor:
        """Γ, the mean of gᵀg over tokens, d_out × d_out, g the gradient of the loss at a linear's output."""
        return self.stats.gradient_gram(linear).to(self.weights.device)

    def magnitude(self, linear: Linear) -> Tensor:
        """The mean of |x| of a linear's inputs over all tokens, d_in."""
        return self.stats.magnitude(linear).to(self.weights.device)

    def fisher(self, linear: Linear) -> Tensor:
        """Σⱼ E[(∂L/∂W)²ᵢⱼ], the Fisher information of each row of a linear's W, d_in."""
        return self.stats.fisher(linear).to(self.weights.device)

    def expected(self, predicted: float) -> float | None:
        """The KL divergence, in nats per token, that is to be expected where `predicted` is the predicted loss.

        By the power law through the two plans that were measured (`trials`), and in proportion for less than the first
        one loses; `None` if they were not measured, or lost nothing.
        """
        trials = [] if self.measured is None else self.measured.trials
        if len(trials) < 2 or trials[0] == trials[1] or min(*trials[0], *trials[1]) <= 0:
            return None
        (x, y), (x_end, y_end) = trials
        power = math.log(y_end / y) / math.log(x_end / x) if predicted > x else 1.0
        return y * (predicted / x) ** power

    def spectrum(self, group: Group, *, weighted: bool) -> Tensor:
        """The squared singular values of a group, falling, of SW if `weighted` by the Grams, else of W; computed once.

        See `layershare.formulas.linalg.spectrum`.
        """

        def compute() -> Tensor:
            linears = [self.spec.linear(*place) for place in group.places]
            weights = [self.weight(linear) for linear in linears]
            return spectrum(weights, [self.gram(linear) if weighted else None for linear in linears], group.side)

        return self.once((group, weighted), compute)

    def once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What is computed under this key, computed the first time that it is asked for."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def lasting(self, layer: int, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """The same of a layer, kept with the statistics, so that a later run, or a resumed one, finds it there.

        `key` must print the same in every process.
        """
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        return self.once((layer, key), lambda: self.stats.derived(layer, name, compute))
