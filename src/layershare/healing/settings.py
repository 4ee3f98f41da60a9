"""What a healing needs, in strict YAML like a compression's recipe; copied into the output as `heal.yaml`."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from layershare.errors import LayershareError
from layershare.foreign import write_yaml
from layershare.recipe import EvaluationSettings, changed, make_as, put, read_values
from layershare.values import (
    STRICT,
    Below1,
    Count,
    Flag,
    Length,
    Names,
    Number,
    Rate,
    Seed,
    ShardSize,
    Tokens,
    Trials,
    UpTo1,
    Weight,
    Whole,
    Word,
)

Train = Literal["lora", "factors", "norms", "full", "deltas"]
LossKind = Literal["ce", "distill", "both"]
AdapterSets = Literal["coefficients", "factors", "linears"]


def _set_or_list(value: Any) -> Any:
    if value in ("coefficients", "factors", "linears") or isinstance(value, list | tuple):
        return value
    raise PydanticCustomError(
        "targets", "Input should be 'coefficients', 'factors', 'linears' or a list of names, such as [q_proj, v_proj]"
    )


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters, merged when training is done: rank r, scale `alpha`/r, and what they are put on."""

    __pydantic_config__ = STRICT
    rank: Count = 8
    """r, at most that of the matrices."""
    alpha: Annotated[Number, Field(gt=0, le=1e6)] = 32.0
    """What is added is scaled by alpha/r."""
    targets: Annotated[AdapterSets | Names, BeforeValidator(_set_or_list)] = "coefficients"
    """The `coefficients` of factored matrices, all their `factors`, all `linears` of the blocks (factors among them),
    or names of linears such as `[q_proj, v_proj]` (of a factored one, the coefficients).
    """
    dropout: Below1 = 0.0
    """The probability with which an input of an adapter is left out in a step."""

    def __post_init__(self) -> None:
        """Raise `LayershareError` if there are no targets."""
        if not self.targets:
            raise LayershareError("lora.targets is empty: name linears, or leave it out.")


@dataclass(frozen=True)
class Loss:
    """What is minimised: cross-entropy (CE), Kullback-Leibler divergence from the teacher (KD), or a mixture."""

    __pydantic_config__ = STRICT
    kind: LossKind = "ce"
    """`ce`, `distill` (KD) or `both`: (1 − α)·CE + α·KD."""
    alpha: UpTo1 = 0.5
    """α, where the loss is `both`."""
    temperature: Annotated[Number, Field(ge=0.01, le=1000)] = 1.0
    """The temperature of both distributions in KD."""
    hidden: Weight = 0.0
    """The weight of the distance of the hidden states behind each block, which is added."""
    store_teacher: Count | None = None
    """Keep so many of the teacher's likeliest tokens on disk, so that the teacher need not be in memory."""

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
class Replacement:
    """Progressive module replacement: the schedule of p from p₀ linearly to 1, after which no gate is left."""

    __pydantic_config__ = STRICT
    start: UpTo1 = 0.3
    """p₀, the probability with which a block stands in for the original's at first."""
    ramp: Annotated[Number, Field(gt=0, le=1)] = 0.6
    """The part of the training after which the last block has replaced the original's for good."""
    spread: Below1 = 0.5
    """How much earlier the deepest block does, as a part of `ramp`; 0 treats all blocks alike."""

    def probability(self, done: float, depth: float) -> float:
        """p = min(1, p₀ + (1 − p₀)·done / (ramp·(1 − spread·depth))).

        `done` ∈ [0, 1] is the part of the training that is over; `depth` is 0 for the first gated block, 1 for the
        last.
        """
        return min(1.0, self.start + (1 - self.start) * done / (self.ramp * (1 - self.spread * depth)))


@dataclass(frozen=True)
class TrainingText:
    """The text that is trained on, and how much of it; without `tokens` and `epochs`, once."""

    __pydantic_config__ = STRICT
    text: Word = "wikitext2"
    """As for a compression's calibration."""
    length: Length | None = None
    """Tokens per block; without, the model's context, up to 2048."""
    tokens: Tokens | None = None
    """Train on so many tokens, …"""
    epochs: Annotated[Number, Field(gt=0, le=10_000)] | None = None
    """… or go through the text so often."""
    held_out: Count = 16
    """Blocks that are not trained on but tell how the training goes."""
    seed: Seed = 2023
    """Chooses the blocks, and the order of those that are trained on."""

    def __post_init__(self) -> None:
        """Raise `LayershareError` if there are two bounds."""
        if self.tokens is not None and self.epochs is not None:
            raise LayershareError("Both `tokens` and `epochs` bound the training; name one of them.")


@dataclass(frozen=True)
class Optimizer:
    """How weights are changed."""

    __pydantic_config__ = STRICT
    name: Word = "adamw_torch"
    """As the Hugging Face Trainer calls it (`optim`)."""
    lr: Rate = 1e-4
    """The highest learning rate."""
    relative: Flag = False
    """The learning rate is a part of the size of each tensor, its root mean square: .0003 to .01 for `factors`."""
    schedule: Word = "cosine"
    """As the Hugging Face Trainer calls it (`lr_scheduler_type`)."""
    warmup: UpTo1 = 0.05
    """The part of the steps in which the learning rate rises."""
    weight_decay: Annotated[Number, Field(ge=0, le=100)] = 0.0
    """By how much weights shrink per step, as a part of the learning rate."""
    max_grad_norm: Rate = 1.0
    """Longer gradients are cut to this length."""
    beta1: Below1 = 0.9
    """How much of the mean gradient is kept from step to step."""
    beta2: Below1 = 0.999
    """The same of the mean square."""
    targets: Names = ()
    """Parts of the names of modules that GaLore and its like project (`optim_target_modules`)."""
    arguments: Annotated[Word, Field(pattern=r"^\w+=[^,]+(,\s*\w+=[^,]+)*$")] | None = None
    """What the optimizer takes besides (`optim_args`): `key=value,…`."""


@dataclass(frozen=True)
class Search:
    """Short trainings before the long one, to choose settings by held-out loss."""

    __pydantic_config__ = STRICT
    trials: Trials = 10
    """How many settings are tried."""
    budget: Annotated[Number, Field(gt=0, le=1)] = 0.1
    """The part of the long training's steps that each of them has."""


@dataclass(frozen=True)
class Healing:
    """One healing: of which folder, what trains, on which loss and text, how, measured on which."""

    __pydantic_config__ = STRICT
    model: Word
    """The folder of a compressed (or any other) model."""
    teacher: Word | None = None
    """The original; without, what the folder says that it was made from."""
    train: Train = "lora"
    """What is changed: adapters, bases and coefficients, norms, everything, or the deltas of `delta`."""
    norms: Flag = False
    """Train the norms, too."""
    lora: Lora = field(default_factory=Lora)
    loss: Loss = field(default_factory=Loss)
    replace: Replacement | None = None
    text: TrainingText = field(default_factory=TrainingText)
    optimizer: Optimizer = field(default_factory=Optimizer)
    batch_size: Count = 8
    """Blocks per step, of all processes together."""
    micro_batch: Count | None = None
    """Blocks at once in one process; without, as many as that gives."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """In which weights are multiplied, `auto` for bfloat16 where the machine is fast at it; held in float32."""
    compile: Flag = False
    """Compile the blocks, one by one."""
    gradient_checkpointing: Flag = False
    """Compute blocks twice instead of keeping what is in them."""
    log_every: Count | None = None
    """Steps between lines of the log; without, some fifty lines in a training."""
    evaluate_every: Count | None = None
    """Steps between measurements on the held-out blocks; without, some ten in a training."""
    save_every: Count | None = None
    """Steps between checkpoints; without, some ten in a training."""
    report_to: Names = ()
    """Trackers that the Hugging Face Trainer knows."""
    seed: Annotated[Whole, Field(ge=0, lt=2**31)] = 0
    """Of adapters, dropout, replacement and search."""
    device: Word = "auto"
    """`cpu`, `cuda` …; `auto` for the accelerator if there is one. Of several, the first that the process sees."""
    trust_remote_code: Flag = False
    """Run the Python code that comes with a model whose class transformers does not have."""
    max_shard_size: ShardSize = "5GB"
    """The size of the largest weight file (KB, MB, GB or TB)."""
    evaluation: EvaluationSettings | None = None
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
        return write_yaml(asdict(self))


def read_healing(
    path: Path | None, given: dict[str, Any], changes: tuple[str, ...] = (), *, replace: bool = False
) -> Healing:
    """Settings from a recipe (`None`: all defaults), with some given by their full key, and changes such as `seed=1`.

    `replace`: with progressive replacement, by its defaults if the recipe has none. Raises as `read_recipe`.
    """
    values = {} if path is None else read_values(path)
    if replace:
        values["replace"] = values.get("replace") or {}
    return make_healing(values, given, changes)


def make_healing(values: dict[str, Any], given: dict[str, Any], changes: tuple[str, ...] = ()) -> Healing:
    """Settings from plain values, in place of which some are given by their full key, and changes.

    The values are changed in place. Raises as `read_healing`.
    """
    for key, value in given.items():
        put(values, key, value)
    return make_as(Healing, changed(values, changes))
