"""A recipe says all that a run needs, in strict YAML: unknown keys and wrong values are errors with a suggestion."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from pydantic import ValidationError

from layershare.errors import LayershareError, unknown
from layershare.foreign import parse_yaml, read_text, reading, write_yaml
from layershare.values import (
    STRICT,
    Count,
    Counted,
    Dial,
    Epochs,
    Flag,
    Length,
    Names,
    Rate,
    Scheme,
    Seed,
    ShardSize,
    Tokens,
    Word,
    checked,
    first_fault,
)

_T = TypeVar("_T")

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""In which a model is run; `auto` for the checkpoint's."""
Effort = Literal["closed", "blocks", "distill"]
"""What is trained once matrices are solved for."""


@dataclass(frozen=True)
class Calibration:
    """The text that a model is compressed for."""

    __pydantic_config__ = STRICT
    text: Word = "wikitext2"
    """`wikitext2`, `c4`, `ptb`, `alpaca`, `stdlib`, or the path of a file or folder."""
    blocks: Count = 256
    """How many blocks of the text are used."""
    length: Length | None = None
    """Tokens per block; without, the model's context, up to 2048."""
    held_out: Count = 16
    """Blocks beside these on which choices are tried: plans, a refit's, the best state of what is refined. Of a text
    that has too few, up to an eighth is held out, whatever the method."""
    seed: Seed = 2023
    """Chooses the blocks."""
    batch_size: Count = 4
    """Blocks that run through the model at once."""
    stats: Word | None = None
    """A folder that keeps the measured statistics, so that runs with the same model and text share them."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What the original and the smaller model are measured on: a text, zero-shot tasks or both."""

    __pydantic_config__ = STRICT
    text: Word | None = "wikitext2"
    """As for calibration, of which the held-out part is taken; null for none."""
    blocks: Count | None = None
    """How many blocks of the text are used; without, all."""
    length: Length | None = None
    """Tokens per block; without, the model's context, up to 2048."""
    tasks: Names = ()
    """Zero-shot tasks of lm-eval, or `papers` for the seven of the papers."""
    tasks_data: Word | None = None
    """A folder with a `TASK.jsonl` for each task; without, rows come from the hub."""
    limit: Count | None = None
    """Rows per task; without, all."""
    batch_size: Count = 4
    """Blocks of text, or rows of a task, at once."""
    dtype: Dtype = "auto"
    """In which the models are run to be measured; `auto` for the checkpoint's, where the machine is fast at it."""

    def __post_init__(self) -> None:
        """Raise `LayershareError` if there is nothing to measure, or settings without the text or tasks they are of."""
        if self.text is None and not self.tasks:
            raise LayershareError("The evaluation has neither a text nor tasks; name one of them.")
        if self.text is None and (self.blocks is not None or self.length is not None):
            raise LayershareError("The evaluation has blocks or length but no text; name one, or leave them out.")
        if not self.tasks and (self.tasks_data is not None or self.limit is not None):
            raise LayershareError("The evaluation has tasks_data or limit but no tasks; name some, or `papers`.")


@dataclass(frozen=True)
class Refine:
    """How each block's own factors are trained towards the original block: AdamW, with cosine decay from `lr` to 0."""

    __pydantic_config__ = STRICT
    epochs: Epochs = 10
    """How often all blocks of text are gone through."""
    lr: Rate = 1e-2
    """The learning rate of the first step, as a part of each tensor's size (its root mean square)."""
    batch_size: Count = 8
    """Blocks of text per step."""
    norms: Flag = False
    """Train the norms of blocks with factors, too."""


@dataclass(frozen=True)
class Distill:
    """How all factors, bases among them, are trained towards what the original predicts: AdamW, with cosine decay."""

    __pydantic_config__ = STRICT
    tokens: Tokens = 2_000_000
    """Train on so many tokens of the calibration's text, of which nothing is held out but `calibration.held_out`."""
    lr: Rate | None = None
    """The highest learning rate, as a part of each tensor's size (root mean square); without, 0.03 · removed / √width,
    where `removed` is the part of the targets' parameters that is gone."""
    batch_size: Count = 8
    """Blocks of text per step."""

    def steps(self, length: int) -> int:
        """How many steps that is, of blocks of so many tokens."""
        return -(-self.tokens // (self.batch_size * length))


BY_EFFORT: dict[str, tuple[type, tuple[Effort, ...]]] = {
    "refine": (Refine, ("blocks", "distill")),
    "distill": (Distill, ("distill",)),
}
"""A recipe's sections of what is trained: how, and the efforts that have it."""


@dataclass(frozen=True)
class Precision:
    """How the matrices of all blocks, or their factors, are stored at the end: in few bits, rounded by GPTQ."""

    __pydantic_config__ = STRICT
    bits: Count = 4
    """Of each number: 8, 6, 5, 4, 3 or 2."""
    basis_bits: Count | None = None
    """Of the numbers of bases; without, as many."""
    group: Count | None = None
    """Neighbours along the input that have one scale; without, 64 integers, or as many as the scheme has."""
    scheme: Scheme = "int"
    """What the numbers are: integers, or floats of 4 bits in groups of 16 (`nvfp4`) or of 32 (`mxfp4`)."""


@dataclass(frozen=True)
class Recipe:
    """One compression: what, how, how small, on which text, measured on which."""

    __pydantic_config__ = STRICT
    model: Word
    """A hub id, a folder, or `sample`, the model that comes with layershare."""
    method: Word = "auto"
    """How it is compressed."""
    options: dict[Word, Any] = field(default_factory=dict)
    """The method's own options."""
    keep: Dial = 0.8
    """What remains: a fraction (0.8), parameters (5.4B) or a size (11GB)."""
    of: Counted = "all"
    """What `keep` counts: all parameters, those of the compressed linears as the papers do, or products per token."""
    plan: Word | None = None
    """A plan file to carry out, with its own method, options and size, in place of one that is made."""
    refit: Literal["auto"] | Flag = "auto"
    """Fit coefficients again to what the compressed layers before really give; `auto` for what the method does."""
    dtype: Dtype = "auto"
    """In which the model is run; `auto` for what its config or checkpoint says, where the machine is fast at it."""
    store_dtype: Dtype = "auto"
    """In which the result is stored; `auto` for each tensor as in the original. Sizes before are told in it, too."""
    device: Word = "auto"
    """`cpu`, `cuda`, `cuda:1` …; `auto` for the accelerator if there is one."""
    trust_remote_code: Flag = False
    """Run the Python code that comes with a model whose class transformers does not have."""
    max_shard_size: ShardSize = "5GB"
    """The size of the largest weight file (KB, MB, GB or TB)."""
    calibration: Calibration = field(default_factory=Calibration)
    effort: Effort = "closed"
    """What is trained then: nothing (`closed`), each block (`blocks`), or after that the whole model (`distill`)."""
    refine: Refine | None = None
    distill: Distill | None = None
    quantize: Precision | None = None
    evaluation: EvaluationSettings | None = None

    def __post_init__(self) -> None:
        """Set `refine` and `distill` where the effort has them. Raise `LayershareError` for those that it has not."""
        for name, (kind, efforts) in BY_EFFORT.items():
            if self.effort in efforts:
                object.__setattr__(self, name, getattr(self, name) or kind())
            elif getattr(self, name) is not None:
                raise LayershareError(
                    f"The recipe has '{name}', but its effort is '{self.effort}'; leave it out ({name}=null), or set "
                    f"effort={efforts[0]}."
                )

    def to_yaml(self) -> str:
        """The recipe with all its values, as copied into every output."""
        return write_yaml(asdict(self))


def parse_recipe(text: str, changes: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, with changes such as `calibration.blocks=32` applied.

    Raises `LayershareError`, with a suggestion, for what is not a recipe.
    """
    return make_recipe(changed(values_of(text), changes))


def read_recipe(path: str | Path, changes: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file. Raises as `parse_recipe`, and if there is no such file."""
    return make_recipe(changed(read_values(path), changes))


def make_recipe(values: dict[str, Any]) -> Recipe:
    """A recipe from plain values. Raises as `parse_recipe`."""
    return make_as(Recipe, values)


def read_values(path: str | Path) -> dict[str, Any]:
    """The plain values in a recipe file. Raises `LayershareError` as `values_of`, and if it cannot be read."""
    with reading(f"The recipe '{path}'", "mend it, or name another file"):
        return values_of(read_text(Path(path)))


def values_of(text: str) -> dict[str, Any]:
    """The plain values of a recipe. Raises `LayershareError` if it is not YAML, or no mapping."""
    with reading("The recipe", "mend it"):
        values = parse_yaml(text)
    if not isinstance(values, dict):
        raise LayershareError("The recipe must be a mapping of keys to values, such as `keep: 0.8`.")
    return values


def changed(values: dict[str, Any], changes: tuple[str, ...]) -> dict[str, Any]:
    """The values with changes such as `calibration.blocks=32` applied, in place.

    Raises `LayershareError` for what is no change.
    """
    for change in changes:
        path, equals, value = change.partition("=")
        if not equals:
            raise LayershareError(f"'{change.removeprefix('options.')}' is not a setting; write key=value.")
        with reading(f"The value in '{change}'", "put it in quotes if it is text"):
            put(values, path, parse_yaml(value))
    return values


def put(values: dict[str, Any], path: str, value: Any) -> None:
    """Set the value of a full key such as `calibration.blocks`, in place.

    Raises `LayershareError` if a part of the key is a value already.
    """
    *sections, key = path.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise LayershareError(f"'{section}' is a value, so it has no '{key}' to set.")
    values[key] = value


def make_as(kind: type[_T], values: dict[str, Any]) -> _T:
    """A recipe of some kind, a dataclass, from plain values. Raises as `parse_recipe`."""
    try:
        return checked(kind, values)
    except ValidationError as error:
        path, said, first = first_fault(error)
        *section, key = path or ["recipe"]
        if first["type"] == "unexpected_keyword_argument":
            where = f"key in {'.'.join(section)}" if section else "key"
            raise unknown(where, key, _keys(kind, section)) from error
        if first["type"] == "missing":
            raise LayershareError(f"The recipe lacks the key '{key}'.") from error
        raise LayershareError(f"'{'.'.join([*section, key])}' in the recipe: {said}.") from error


def _keys(kind: Any, section: list[str]) -> list[str]:
    """The keys of a section of a kind of recipe."""
    for name in section:
        hint = get_type_hints(kind)[name]
        kind = next(each for each in (hint, *get_args(hint)) if is_dataclass(each))
    return [each.name for each in fields(kind)]
