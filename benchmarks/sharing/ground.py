"""A model, its statistics and its texts, and each of its matrices as `formulas.Seen`."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.sharing.formulas import Seen
from layershare.calibrate.stats import calibrate
from layershare.calibrate.text import Text, load_text
from layershare.formulas.two_sided import seen_through
from layershare.methods.auto import Auto
from layershare.model.arch import Linear, Spec
from layershare.model.describe import describe
from layershare.model.hub import load
from layershare.model.source import read_config, read_tokenizer, resolve
from layershare.model.weights import Weights
from layershare.plan.evidence import Evidence
from layershare.plan.ranks import natural_side

BATCH = 4
AUTO = Auto(compare=False)
Values = dict[str, Any]


@dataclass(frozen=True)
class Ground:
    """A model in memory with what it is measured by; `test` is text that nothing is fitted or chosen on."""

    evidence: Evidence
    test: Text
    _seen: dict[Linear, Seen] = field(default_factory=dict)

    @classmethod
    def open(cls, source: str, text: Values, stats: Path) -> "Ground":
        """Load the model and its text, in float32, and measure the statistics that are not there yet."""
        folder = resolve(source)
        model = load(folder, dtype="float32")
        spec, weights = describe(model), Weights.of(model)
        every = load_text(
            text["text"],
            read_tokenizer(folder),
            split="train",
            blocks=text["blocks"],
            length=text["length"],
            spare=text["held_out"] + text["test"],
            vocabulary=read_config(folder).get_text_config().vocab_size,
        )
        calibration, rest = every.split(text["blocks"])
        held_out, test = rest.split(text["held_out"])
        kinds = sorted(AUTO.uses)
        measured = calibrate(weights, spec, calibration, stats, batch_size=BATCH, kinds=kinds)
        return cls(Evidence(spec, weights, measured, calibration, held_out, batch_size=BATCH), test)

    @property
    def spec(self) -> Spec:
        """The model's."""
        return self.evidence.spec

    def seen(self, linear: Linear) -> Seen:
        """A matrix from the side that lies in the residual stream; its losses are in nats per token."""
        if linear not in self._seen:
            self._seen[linear] = seen(self.evidence, linear)
        return self._seen[linear]

    def forget(self) -> None:
        """Let go of the matrices that were seen."""
        self._seen.clear()

    @cached_property
    def identity(self) -> Values:
        """What results are made from."""
        texts = {"calibration": self.evidence.text, "held_out": self.evidence.held_out, "test": self.test}
        named = {name: {**text.identity, "seed": 2023} for name, text in texts.items()}
        return {"model_fingerprint": self.evidence.weights.fingerprint, "texts": named}


def seen(evidence: Evidence, linear: Linear) -> Seen:
    """A matrix of a model as it is seen from its side in the residual stream, scaled to nats per token."""
    weight, gram = evidence.weight(linear), evidence.gram(linear).double()
    root = AUTO.outer_root(evidence, linear)
    assert root is not None
    scale = 0.5 / evidence.stats.tokens
    if natural_side(linear.role) == "input":
        through = seen_through(weight, root)
        return Seen(gram, scale * (through @ through.T), linear.d_out)
    wide = weight.double()
    return Seen(root.T @ root, scale * (wide.T @ (gram @ wide)), linear.d_in)
