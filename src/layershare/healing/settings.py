"""What a healing needs, in strict YAML like a compression's recipe; copied into the output as `heal.yaml`."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from layershare.errors import LayershareError
from layershare.healing.replacement import Replacement
from layershare.recipe import STRICT, Test, changed, make_as, read_text, values_of

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Train = Literal["lora", "factors", "norms", "full", "deltas"]
LossKind = Literal["ce", "distill", "both"]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters, merged when training is done: rank r, scale `alpha`/r, and what they are put on.

    `targets`: the `coefficients` of factored matrices, all their `factors`, all `linears` of the blocks (factors among
    them), or names of linears such as `[q_proj, v_proj]` (of a factored one, the coefficients).
    """

    __pydantic_config__ = STRICT
    rank: Count = 8
    alpha: Positive = 32.0
    targets: Literal["coefficients", "factors", "linears"] | tuple[str, ...] = "coefficients"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def __post_init__(self) -> None:
        """Raise `LayershareError` if there are no targets."""
        if not self.targets:
            raise LayershareError("lora.targets is empty: name linears, or leave it out.")


@dataclass(frozen=True)
class Loss:
    """What is minimised: cross-entropy (`ce`), distance from the teacher (`distill`), or (1 − α)·CE + α·KD (`both`).

    KD is the Kullback-Leibler divergence from the teacher's distribution at `temperature`; `hidden` weighs the distance
    of the hidden states behind each block, which is added.
    """

    __pydantic_config__ = STRICT
    kind: LossKind = "ce"
    alpha: Fraction = 0.5
    temperature: Positive = 1.0
    hidden: Annotated[float, Field(ge=0)] = 0.0
    store_teacher: Count | None = None

    def __post_init__(self) -> None:
        """Raise `LayershareError` for a stored teacher whose hidden states are wanted, or who is not in the loss."""
        if self.store_teacher is not None and (self.hidden or self.kind == "ce"):
            raise LayershareError(
                "loss.store_teacher keeps the teacher's logits, for a loss of `distill` or `both` with loss.hidden 0."
            )

    @property
    def weights(self) -> tuple[float, float]:
        """Those of cross-entropy and divergence."""
        return {"ce": (1.0, 0.0), "distill": (0.0, 1.0), "both": (1 - self.alpha, self.alpha)}[self.kind]

    @property
    def teaches(self) -> bool:
        """Whether there is a teacher in it."""
        return self.kind != "ce" or self.hidden > 0


@dataclass(frozen=True)
class TrainingText:
    """The text that is trained on, in blocks of `length` tokens (`None`: what fits, ≤ 2048), and how much of it.

    `tokens` bounds the training, or `epochs`; without either it is one epoch. `held_out` blocks are not trained on but
    tell how the training goes. `seed` orders the blocks.
    """

    __pydantic_config__ = STRICT
    text: str = "wikitext2"
    length: Annotated[int, Field(ge=2)] | None = None
    tokens: Count | None = None
    epochs: Positive | None = None
    held_out: Count = 16
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 2023

    def __post_init__(self) -> None:
        """Raise `LayershareError` if there are two bounds."""
        if self.tokens is not None and self.epochs is not None:
            raise LayershareError("Both `tokens` and `epochs` bound the training; name one of them.")


@dataclass(frozen=True)
class Optimizer:
    """How weights are changed: names of optimizer and schedule are the HF Trainer's (`optim`, `lr_scheduler_type`).

    `warmup` is a fraction of the steps. `targets` are the modules that GaLore and its like project
    (`optim_target_modules`), `arguments` what the optimizer takes besides (`optim_args`).
    """

    __pydantic_config__ = STRICT
    name: str = "adamw_torch"
    lr: Positive = 1e-4
    schedule: str = "cosine"
    warmup: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Positive = 1.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    targets: tuple[str, ...] = ()
    arguments: str | None = None


@dataclass(frozen=True)
class Search:
    """Short trainings before the long one, each with `budget` of its steps, to choose settings by held-out loss."""

    __pydantic_config__ = STRICT
    trials: Count = 10
    budget: Annotated[float, Field(gt=0, le=1)] = 0.1


@dataclass(frozen=True)
class Healing:
    """One healing: of which folder, what trains, on which loss and text, how, measured on which.

    `norms`: the norms train, too. `teacher`: the original if `None`. `replace`: progressive module replacement.
    `batch_size`: blocks per step, of all processes together; `micro_batch`: blocks at once in one process. Weights are
    held and changed in float32, and multiplied in `precision`. `compile`: the blocks, one by one. `*_every`: steps
    between lines of the log, measurements on the held-out blocks and checkpoints (`None`: some fifty, ten and ten in a
    run). `report_to`: trackers that the HF Trainer knows. `search`: choose learning rate, loss and replacement first.
    `trust_remote_code`: run the Python code that comes with a model whose class transformers does not have.
    """

    __pydantic_config__ = STRICT
    model: str
    teacher: str | None = None
    train: Train = "lora"
    norms: bool = False
    lora: Lora = field(default_factory=Lora)
    loss: Loss = field(default_factory=Loss)
    replace: Replacement | None = None
    text: TrainingText = field(default_factory=TrainingText)
    optimizer: Optimizer = field(default_factory=Optimizer)
    batch_size: Count = 8
    micro_batch: Count | None = None
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    compile: bool = False
    gradient_checkpointing: bool = False
    log_every: Count | None = None
    evaluate_every: Count | None = None
    save_every: Count | None = None
    report_to: tuple[str, ...] = ()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: str = "auto"
    trust_remote_code: bool = False
    max_shard_size: Annotated[str, Field(pattern=r"^\d+(\.\d+)?(KB|MB|GB|TB)$")] = "5GB"
    evaluation: Test | None = None
    search: Search | None = None

    def __post_init__(self) -> None:
        """Raise `LayershareError` for a replacement by blocks of a teacher of whom there are logits alone."""
        if self.replace is not None and self.loss.store_teacher is not None:
            raise LayershareError("Replacement needs the teacher's blocks in memory: leave loss.store_teacher out.")

    @property
    def teaches(self) -> bool:
        """Whether training needs the teacher."""
        return self.loss.teaches or self.replace is not None

    def to_yaml(self) -> str:
        """The settings with all their values, as copied into the output."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


def read_healing(
    path: Path | None, given: dict[str, Any], changes: tuple[str, ...] = (), *, replace: bool = False
) -> Healing:
    """Settings from a recipe (`None`: all defaults), with some given by their full key, and changes such as `seed=1`.

    `replace`: with progressive replacement, by its defaults if the recipe has none. Raises as `read_recipe`.
    """
    values = {} if path is None else values_of(read_text(path))
    if replace:
        values["replace"] = values.get("replace") or {}
    return make_healing(values, given, changes)


def make_healing(values: dict[str, Any], given: dict[str, Any], changes: tuple[str, ...] = ()) -> Healing:
    """Settings from plain values, in which some are given by their full key, and changes. Raises as `read_healing`."""
    settings = tuple(f"{key}={json.dumps(value)}" for key, value in given.items())
    return make_as(Healing, changed(values, (*settings, *changes)))
