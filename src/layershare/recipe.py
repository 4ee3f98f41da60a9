"""A recipe says all that a run needs, in strict YAML: unknown keys and wrong values are errors with a suggestion."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from layershare.errors import LayershareError, unknown

STRICT = ConfigDict(extra="forbid")
_T = TypeVar("_T")

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""In which a model is run; `auto` for the checkpoint's."""


@dataclass(frozen=True)
class Calibration:
    """The text that a model is compressed for: name or path, number and length of blocks (`None`: what fits, ≤ 2048).

    `stats`: a folder to keep the measured statistics in; runs with the same model and text share it.
    """

    __pydantic_config__ = STRICT
    text: str = "wikitext2"
    blocks: Annotated[int, Field(ge=1)] = 256
    length: Annotated[int, Field(ge=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 2023
    batch_size: Annotated[int, Field(ge=1)] = 4
    stats: str | None = None


@dataclass(frozen=True)
class Test:
    """What original and compressed model are measured on: a text (`None`: none) and zero-shot tasks.

    `blocks` of the text, `None` for all of it. `tasks`: names of lm-eval's, or `papers` for the seven of the papers;
    their rows come from the hub, or from `tasks_data`, a folder with a `TASK.jsonl` for each. `limit`: rows per task.
    """

    __test__ = False
    __pydantic_config__ = STRICT
    text: str | None = "wikitext2"
    blocks: Annotated[int, Field(ge=1)] | None = None
    length: Annotated[int, Field(ge=2)] | None = None
    tasks: tuple[str, ...] = ()
    tasks_data: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 4
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        """Raise `LayershareError` if there is nothing to measure, or settings of tasks without tasks."""
        if self.text is None and not self.tasks:
            raise LayershareError("The evaluation has neither a text nor tasks; name one of them.")
        if not self.tasks and (self.tasks_data is not None or self.limit is not None):
            raise LayershareError("The evaluation has tasks_data or limit but no tasks; name some, or `papers`.")


@dataclass(frozen=True)
class Refine:
    """How each block's own factors are trained towards the original block: AdamW, with cosine decay from `lr` to 0.

    `batch_size`: text blocks per step. `norms`: train the norms of blocks with factors, too. (AA-SVD, arXiv 2604.02119,
    reports 25 epochs of 256 blocks at 1e-4, 32 per step, for 7B; smaller models want larger steps.)
    """

    __pydantic_config__ = STRICT
    epochs: Annotated[int, Field(ge=1)] = 10
    lr: Annotated[float, Field(gt=0)] = 5e-4
    batch_size: Annotated[int, Field(ge=1)] = 8
    norms: bool = False


@dataclass(frozen=True)
class Recipe:
    """One compression: what, how, how small, on which text, measured on which.

    `keep`: `0.8`, `5.4B` or `11GB`, counted `of` all parameters or of the targets. `plan`: a plan file to carry out
    in place of the method's own. `dtype`: in which the model is run, `auto` for what its config or checkpoint says.
    `store_dtype`: in which the result is stored, `auto` for each tensor as in the original. `trust_remote_code`: run
    the Python code that comes with a model whose class transformers does not have.
    `refine`: train each block on the calibration text after it is solved; not done without.
    """

    __pydantic_config__ = STRICT
    model: str
    method: str = "basis-sharing"
    options: dict[str, Any] = field(default_factory=dict)
    keep: float | str = 0.8
    of: Literal["all", "targets"] = "all"
    plan: str | None = None
    dtype: Dtype = "auto"
    store_dtype: Dtype = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    max_shard_size: Annotated[str, Field(pattern=r"^\d+(\.\d+)?(KB|MB|GB|TB)$")] = "5GB"
    calibration: Calibration = field(default_factory=Calibration)
    refine: Refine | None = None
    evaluation: Test | None = None

    def to_yaml(self) -> str:
        """The recipe with all its values, as copied into every output."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


def parse_recipe(text: str, changes: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, with changes such as `calibration.blocks=32` applied.

    Raises `LayershareError`, with a suggestion, for what is not a recipe.
    """
    return make_recipe(changed(values_of(text), changes))


def read_recipe(path: str | Path, changes: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file. Raises as `parse_recipe`, and if there is no such file."""
    return parse_recipe(read_text(path), changes)


def make_recipe(values: dict[str, Any]) -> Recipe:
    """A recipe from plain values. Raises as `parse_recipe`."""
    return make_as(Recipe, values)


def read_text(path: str | Path) -> str:
    """What is in a recipe file. Raises `LayershareError` if there is no such file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LayershareError(f"The recipe '{path}' cannot be read ({type(error).__name__}).") from error


def values_of(text: str) -> dict[str, Any]:
    """The plain values of a recipe. Raises `LayershareError` if it is not YAML, or no mapping."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise LayershareError(f"The recipe is not YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(values, dict):
        raise LayershareError("The recipe must be a mapping of keys to values, at least `model`.")
    return values


def changed(values: dict[str, Any], changes: tuple[str, ...]) -> dict[str, Any]:
    """The values with changes such as `calibration.blocks=32` applied, in place.

    Raises `LayershareError` for what is no change.
    """
    for change in changes:
        path, equals, value = change.partition("=")
        if not equals:
            raise LayershareError(f"'{change.removeprefix('options.')}' is not a setting; write key=value.")
        try:
            _put(values, path.split("."), yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise LayershareError(f"The value in '{change}' is not YAML.") from error
    return values


def make_as(kind: type[_T], values: dict[str, Any]) -> _T:
    """A recipe of some kind, a dataclass, from plain values. Raises as `parse_recipe`."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        # A misspelt key is both unknown and missing; its own name is the better hint.
        first = min(error.errors(), key=lambda each: each["type"] != "unexpected_keyword_argument")
        *section, key = [str(part) for part in first["loc"]] or ["recipe"]
        if first["type"] == "unexpected_keyword_argument":
            where = f"key in {section[0]}" if section else "key"
            raise unknown(where, key, _keys(kind, section)) from error
        if first["type"] == "missing":
            raise LayershareError(f"The recipe lacks the key '{key}'.") from error
        raise LayershareError(f"'{'.'.join([*section, key])}' in the recipe: {first['msg']}.") from error


def _keys(kind: Any, section: list[str]) -> list[str]:
    """The keys of a section of a kind of recipe."""
    for name in section:
        hint = get_type_hints(kind)[name]
        kind = next(each for each in (hint, *get_args(hint)) if is_dataclass(each))
    return [each.name for each in fields(kind)]


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    *sections, key = path
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise LayershareError(f"'{section}' is a value, so it has no '{key}' to set.")
    values[key] = value
