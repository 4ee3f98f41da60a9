"""What settings may hold: the types that recipes, healings, methods' options and plans share, and how faults are told.

A truth value is no number here, a number in quotes is a word, and no number is NaN or infinite. Every number has bounds
within which it means something and can be computed with.
"""

import re
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
"""That of every dataclass of settings (`__pydantic_config__`)."""

MOST = 10**9
"""The highest count; what is counted in tokens may be a million times that."""


def _no_number(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "Input should be true or false")
    return value


def _listed(value: Any) -> Any:
    """`q,k` as a list."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or "" in names:
        raise PydanticCustomError("names", "Input should be a list of names, such as [one, two]")
    return names


def _numbers(value: Any) -> Any:
    """`2,3` and 2 as lists."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", value):
        return [int(each) for each in value.split(",")]
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("numbers", "Input should be a list of whole numbers, such as [2, 3]")
    return value


def _dial(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(value, str) and not (number and abs(value) < 1e20):
        raise PydanticCustomError("dial_type", "Input should be a fraction (0.8), parameters (5.4B) or a size (11GB)")
    return value


def _shards(value: str) -> str:
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(KB|MB|GB|TB)", value)
    if match is None or float(match[1]) * 1000 ** (1 + ("KB", "MB", "GB", "TB").index(match[2])) < 1000:
        raise PydanticCustomError("size", "Input should be a size of at least 1KB, such as 5GB")
    return value


Word = Annotated[str, Field(strict=True)]
Flag = Annotated[bool, BeforeValidator(_no_number)]
"""true or false; yes, no, on and off are understood, 1 and 0 are not."""
Names = Annotated[tuple[Word, ...], BeforeValidator(_listed)]
"""A list of names, or `one,two`."""
Whole = Annotated[int, Field(strict=True)]
Wholes = Annotated[tuple[Whole, ...], BeforeValidator(_numbers)]
"""A list of whole numbers, or `2,3`."""
Count = Annotated[Whole, Field(ge=1, le=MOST)]
Length = Annotated[Whole, Field(ge=2, le=MOST)]
"""Tokens per block of text."""
Tokens = Annotated[Whole, Field(ge=1, le=10**6 * MOST)]
Epochs = Annotated[Whole, Field(ge=1, le=10_000)]
Trials = Annotated[Whole, Field(ge=1, le=10_000)]
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(strict=True)]
Weight = Annotated[Number, Field(ge=0, le=1e6)]
"""By which a term is multiplied."""
UpTo1 = Annotated[Number, Field(ge=0, le=1)]
Below1 = Annotated[Number, Field(ge=0, lt=1)]
Rate = Annotated[Number, Field(ge=1e-12, le=1e30)]
"""A learning rate, or the length of a gradient: what float32 can still be multiplied by."""
Dial = Annotated[float | str, BeforeValidator(_dial)]
"""What `plan.budget.parse_keep` reads."""
Counted = Literal["all", "targets", "multiplications"]
"""What `keep` counts: all parameters, those of the compressed linears alone, or multiplications per token."""
Scheme = Literal["int", "nvfp4", "mxfp4"]
"""What numbers of few bits are: whole ones, or floats of 4 bits with scales of one kind or another."""
ShardSize = Annotated[Word, AfterValidator(_shards)]

_T = TypeVar("_T")
_SAID = {
    "dataclass_type": "Input should be a mapping of keys to values",
    "dict_type": "Input should be a mapping of keys to values",
    "bool_parsing": "Input should be true or false",
    "bool_type": "Input should be true or false",
    "string_type": "Input should be a word or text",
    "int_type": "Input should be a whole number",
    "float_type": "Input should be a number",
    "invalid_key": "keys should be words",
    "list_type": "Input should be a list",
    "tuple_type": "Input should be a list",
    "too_long": "there are too many entries",
    "missing": "it is missing",
    "unexpected_keyword_argument": "there is no such key",
    "model_attributes_type": "Input should be a mapping of keys to values",
    "union_tag_invalid": "there is no such kind",
    "string_pattern_mismatch": "Input should be written as key=value,key=value",
}
"""Faults that pydantic tells in the words of Python."""

_BOUNDS = {
    "greater_than": "above",
    "greater_than_equal": "at least",
    "less_than": "below",
    "less_than_equal": "at most",
}


adapter = cache(TypeAdapter)
"""What reads values as a dataclass; making it takes longer than all reading."""


def checked(kind: type[_T], values: Any) -> _T:
    """The values as a dataclass of settings. Raises `pydantic.ValidationError`, or what the dataclass raises."""
    return adapter(kind).validate_python(values)


def first_fault(error: ValidationError) -> tuple[list[str], str, ErrorDetails]:
    """The keys that lead to the first fault, what is wrong, and pydantic's details.

    A misspelt key is both unknown and missing: its own name comes first, as the better hint.
    """
    details = error.errors(include_url=False, include_input=False)
    first = min(details, key=lambda each: each["type"] != "unexpected_keyword_argument")
    said = _SAID.get(first["type"], first["msg"])
    if first["type"] in _BOUNDS:
        (bound,) = first.get("ctx", {}).values()
        said = f"Input should be {_BOUNDS[first['type']]} {f'{bound:,}' if isinstance(bound, int) else f'{bound:g}'}"
    return [str(part) for part in first["loc"]], said, first
