"""`results.json` and its like: what is noted, where the numbers come from, and reading it again.

What is written is `store.as_json` of these dataclasses, field by field; other keys of a file are passed over.
"""

import os
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import AfterValidator, Field, ValidationError

from layershare.calibrate.text import Blocks
from layershare.evaluate.evaluator import Measured
from layershare.evaluate.speed import Rate
from layershare.foreign import read_mapping, reading
from layershare.model.arch import Spec
from layershare.plan.budget import Sizes
from layershare.recipe import Distill, Refine
from layershare.store import as_json, written_with
from layershare.values import Flag, Number, Scheme, Whole, Word, checked

_version = cache(version)
"""The version of an installed package, whose metadata is read once."""

RESULTS = "results.json"
PACKAGES = ("layershare", "torch", "transformers", "tokenizers", "safetensors", "datasets", "accelerate")


def _positive(sizes: Sizes) -> Sizes:
    if any(count <= 0 for size in vars(sizes).values() for count in vars(size).values()):
        raise ValueError("a size is not positive")
    return sizes


_T = TypeVar("_T")
_Sizes = Annotated[Sizes, AfterValidator(_positive)]
_Count = Annotated[Whole, Field(gt=0)]


@dataclass(frozen=True)
class Machine:
    """What a number was measured on; `memory` in bytes."""

    system: Word
    processor: Word
    cores: Whole | None
    threads: Whole
    memory: Whole
    accelerators: list[Word]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """When and where numbers come from, and the versions of the packages that matter."""

    date: Word
    versions: dict[Word, Word]
    machine: Machine

    @classmethod
    def here(cls, *more: str) -> "Environment":
        """That of now; `more`: further packages that matter."""
        return cls(
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions={"python": platform.python_version(), **{name: _version(name) for name in (*PACKAGES, *more)}},
            machine=Machine(
                system=f"{platform.system()} {platform.machine()}",
                processor=_processor(),
                cores=os.cpu_count(),
                threads=torch.get_num_threads(),
                memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                accelerators=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            ),
        )


@dataclass(frozen=True)
class CalibrationText(Blocks):
    """The text that a model was compressed for, and the seed that chose its blocks."""

    seed: Whole


@dataclass(frozen=True)
class TrainingText(CalibrationText):
    """The text that a model was healed on, of which `held_out` blocks were only measured on."""

    held_out: Whole


OWN = "own"
REFITTED = "refitted"
REFINED = "refined"
DISTILLED = "distilled"
QUANTIZED = "quantized"
"""What is compared on held-out text beside a method's rivals, which have labels of their own: where the method plans
bits, all of them in integers; else what the recipe stores as integers is `QUANTIZED`, and all others are in floats."""


@dataclass(frozen=True)
class HeldOutText(Blocks):
    """The text that candidates were compared on: the label of the one that was taken, and label -> KL divergence.

    `expected`: what the method's own plan was expected to have, if it was told before.
    """

    chosen: Word
    kl: dict[Word, Number]
    expected: Number | None = written_with("expected")


@dataclass(frozen=True)
class Spectrum:
    """Shares of the sum of all squared singular values, of the components of these numbers."""

    index: list[Whole]
    share: list[Number]


@dataclass(frozen=True)
class Solved:
    """What is known of a solved edit; see `Factored.facts`. `largest`: the largest number of a pivoted basis."""

    rank: Whole | None = written_with("rank")
    parameters: Whole | None = written_with("parameters")
    error: Number | None = written_with("error")
    spectrum: Spectrum | None = written_with("spectrum")
    largest: Number | None = written_with("largest")

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "Solved":
        """The facts that were noted when it was solved."""
        spectrum = facts.get("spectrum")
        return cls(**{**facts, "spectrum": spectrum and Spectrum(**spectrum)})


@dataclass(frozen=True)
class RefinedBlock:
    """A block's relative error on held-out text before and after it was refined, and after which epoch that was."""

    start: Number
    error: Number
    epoch: Whole


@dataclass(frozen=True)
class Refined:
    """How blocks were refined: layer -> what became of it. The checkpoint is refined if it was `kept`.

    It was not if that took the whole model away from the original on held-out text.
    """

    settings: Refine
    kept: Flag
    blocks: dict[Word, RefinedBlock]


@dataclass(frozen=True)
class Distilled:
    """How all factors were distilled: `tokens` in so many `steps` of `lr`, of which those up to the `best` were taken.

    The checkpoint is distilled if it was `kept`; it was not if that took it away from the original on held-out text, or
    diverged.
    """

    settings: Distill
    kept: Flag
    tokens: Whole
    steps: Whole
    lr: Number
    best: Whole


@dataclass(frozen=True)
class Stages:
    """What was measured before and after healing."""

    before: Measured
    after: Measured


@dataclass(frozen=True, kw_only=True)
class Healed(Environment):
    """What `heal` notes: its settings, by section, what it needed, and the Trainer's log.

    `search`: trials and what was chosen; `previous`: what an earlier healing noted.
    """

    settings: dict[Word, Any]
    fingerprint: Word
    teacher: Word | None
    text: TrainingText
    needs: dict[Word, Any]
    search: dict[Word, Any] | None = written_with("search")
    tokens_per_second: Number
    processes: Whole
    log: list[dict[Word, Whole | Number]]
    evaluation: Stages | None = written_with("evaluation")
    previous: dict[Word, Any] | None = written_with("previous")
    seconds: dict[Word, Number]

    @property
    def measured(self) -> Measured:
        """What was measured of the healed model."""
        return Measured() if self.evaluation is None else self.evaluation.after


@dataclass(frozen=True, kw_only=True)
class Quantized(Environment):
    """What `quantize` notes: the folder that it was given, and how matrices are stored, `basis_bits` those of bases.

    `text`: what errors were compensated for, `None` for rounding. `before`, `after`: bytes of all matrices in the
    blocks. `error`: what quantizing a factor lost, relative, on average of all; see `solve.quantize`.
    """

    model: Word
    bits: _Count
    basis_bits: _Count
    group: _Count
    scheme: Scheme
    text: CalibrationText | None
    before: _Count
    after: _Count
    error: Number
    seconds: Number

    @property
    def words(self) -> str:
        """`4 bits`, or the name of the scheme."""
        return f"{self.bits} bits" if self.scheme == "int" else self.scheme


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What the list needs of `results.json`."""

    model: Word
    method: Word
    keep: Word | Number
    of: Word
    before: _Sizes
    after: _Sizes
    evaluation: Measured | None = written_with("evaluation")
    healing: Healed | None = written_with("healing")
    quantization: Quantized | None = written_with("quantization")

    @property
    def after_words(self) -> str:
        """What was done after the compression, to be put behind the method's name: `, healed, 4 bits`."""
        healed = ", healed" if self.healing else ""
        return f"{healed}, {self.quantization.words}" if self.quantization else healed

    @property
    def measured(self) -> Measured:
        """What was measured of the model as it lies in the folder: of a healed one, after it was healed."""
        return self.healing.measured if self.healing else self.evaluation or Measured()


@dataclass(frozen=True, kw_only=True)
class Results(Environment, Listed):
    """What a run notes.

    `original`: what a card says of the model. `shapes`: role -> d_in and d_out in every layer, `None` where a layer has
    none. `groups`: an edit's id -> its solution. `seconds`: step -> how long it took.
    """

    original: dict[Word, Word]
    model_fingerprint: Word
    options: dict[Word, Any] | None
    calibration: CalibrationText | None
    ridge: Number
    refit: Flag
    refit_ridge: Number
    refine: Refined | None
    distill: Distilled | None
    groups: dict[Word, Solved]
    shapes: dict[Word, list[tuple[_Count, _Count] | None]]
    held_out: HeldOutText | None = written_with("held_out")
    seconds: dict[Word, Number]
    samples: list[dict[Word, Word]] | None = written_with("samples")


@dataclass(frozen=True, kw_only=True)
class Evaluated(Environment):
    """What `eval` notes."""

    model: Word
    original: Word | None
    evaluation: Measured


@dataclass(frozen=True, kw_only=True)
class Speed(Environment):
    """What `bench` notes; `engine` with its version.

    `memory`: bytes of the weights in transformers, and the most that an engine held in vLLM.
    """

    model: Word
    original: Word | None
    engine: Word
    dtype: Word
    device: Word
    batches: list[_Count]
    prompt: _Count
    new: _Count
    rounds: _Count
    rates: list[Rate]
    memory: _Count
    original_memory: _Count | None

    @property
    def of_an_engine(self) -> bool:
        """Whether memory is all that an engine held, and not that of the weights alone."""
        return self.engine.startswith("vllm")


def results_of(folder: Path) -> dict[str, Any]:
    """What is in a folder's `results.json`; nothing if it has none. Raises `LayershareError` if it is damaged."""
    file = folder / RESULTS
    if not file.exists():
        return {}
    with reading(f"The {RESULTS} of '{folder}'", "delete it, or compress the model again"):
        return read_mapping(file)


def read_as(kind: type[_T], path: Path) -> _T:
    """The content of a file of one of these kinds. Raises `OSError` or `ValueError`; see `foreign.reading`."""
    return parsed_as(kind, read_mapping(path))


def parsed_as(kind: type[_T], value: dict[str, Any]) -> _T:
    """What was read from a file as one of these kinds. Raises `ValueError` if it is not."""
    try:
        return checked(kind, value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        what = "it lacks" if first["type"] == "missing" else f"{first['msg'].lower()} in"
        raise ValueError(f"{what} '{place}'") from error


def environment(*more: str) -> dict[str, Any]:
    """The fields of `Environment.here`, as JSON has them."""
    return as_json(Environment.here(*more))


def shapes(spec: Spec) -> dict[str, list[tuple[int, int] | None]]:
    """Role -> d_in and d_out of its matrix in every layer, `None` where a layer has none."""
    dims = {(linear.role, linear.layer): (linear.d_in, linear.d_out) for linear in spec.linears}
    return {role: [dims.get((role, layer)) for layer in range(spec.n_layers)] for role in spec.roles}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
