"""What a method may look at when it plans and solves: weights, measured statistics, and the text itself."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from layershare.calibrate.stats import Stats
from layershare.calibrate.text import Text
from layershare.errors import LayershareError
from layershare.model.arch import Linear, Spec
from layershare.model.weights import Weights, require_finite
from layershare.plan.ranks import Group
from layershare.progress import Progress, no_progress
from layershare.solve.linalg import spectrum


@dataclass(frozen=True)
class Inputs:
    """What was measured at one linear; every property reads from disk, in float32, onto the device of `Weights`."""

    linear: Linear
    device: torch.device
    stats: Stats

    @property
    def gram(self) -> Tensor:
        """G = XᵀX, d_in × d_in, summed over all tokens."""
        return self.stats.gram(self.linear).to(self.device)

    @property
    def magnitude(self) -> Tensor:
        """The mean of |x| over all tokens, d_in."""
        return self.stats.magnitude(self.linear).to(self.device)

    @property
    def fisher(self) -> Tensor:
        """Σⱼ E[(∂L/∂W)²ᵢⱼ], the Fisher information of each row of W, d_in."""
        return self.stats.fisher(self.linear).to(self.device)


@dataclass(frozen=True)
class Evidence:
    """A model, its statistics and its calibration text, as far as the run has them, and who is told of progress.

    Raises `LayershareError` where a method asks for what was not measured.
    """

    spec: Spec
    weights: Weights
    measured: Stats | None = None
    text: Text | None = None
    progress: Progress = no_progress

    @property
    def stats(self) -> Stats:
        """The statistics."""
        if self.measured is None:
            raise LayershareError("This method needs measured statistics; give it a text.")
        return self.measured

    def weight(self, linear: Linear) -> Tensor:
        """The weight of a linear as W: d_in × d_out, on the device of `Weights`.

        Raises `LayershareError` if it is not finite.
        """
        name = self.spec.weight_name(linear)
        weight = self.weights.tensor(name)
        require_finite([(name, weight)])
        return row_convention(weight.to(self.weights.device), linear)

    def inputs(self, linear: Linear) -> Inputs | None:
        """What was measured at a linear, `None` in a run without statistics."""
        return None if self.measured is None else Inputs(linear, self.weights.device, self.measured)

    def spectrum(self, group: Group, *, weighted: bool) -> Tensor:
        """The squared singular values of a group, falling, of SW if `weighted` by the Grams, else of W; computed once.

        See `layershare.solve.linalg.spectrum`. Raises `LayershareError` if the Grams were not measured.
        """
        if (group, weighted) not in self._spectra:
            linears = [self.spec.linear(*place) for place in group.places]
            weights = [self.weight(linear) for linear in linears]
            inputs = [Inputs(linear, self.weights.device, self.stats) if weighted else None for linear in linears]
            grams = [None if each is None else each.gram for each in inputs]
            self._spectra[group, weighted] = spectrum(weights, grams, group.side)
        return self._spectra[group, weighted]

    @cached_property
    def _spectra(self) -> dict[tuple[Group, bool], Tensor]:
        return {}


def row_convention(weight: Tensor, linear: Linear) -> Tensor:
    """A stored weight as W: d_in × d_out."""
    return weight if linear.conv1d else weight.T
