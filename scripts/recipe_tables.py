"""Tables of what a recipe may hold, for docs/recipe.md, from the dataclasses that read it."""

import json
from typing import Any

from layershare.healing.settings import Healing
from layershare.methods import METHODS
from layershare.recipe import BY_EFFORT, Recipe
from layershare.values import MOST, adapter

Schema = dict[str, Any]
KINDS = {"compression": Recipe, "healing": Healing}


def recipe_page(name: str) -> str:
    """Every key of a kind of recipe: one table for the recipe itself and one for each of its sections."""
    return "\n\n".join(_tables(adapter(KINDS[name]).json_schema()))


def options_page() -> str:
    """The options of every method that has some."""
    schemas = {name: adapter(method).json_schema() for name, method in METHODS.items()}
    return "\n\n".join(
        f"### `{name}`\n\n{_table(schema, {})}" for name, schema in schemas.items() if schema.get("properties")
    )


def _tables(schema: Schema) -> list[str]:
    named = schema.get("$defs", {})
    tables = [f"{schema['description']}\n\n{_table(schema, named)}"]
    for key, value in schema["properties"].items():
        if (section := _section(value, named)) is not None:
            without = "\n\nWithout this section it is not done." if value.get("default", 0) is None else ""
            if key in BY_EFFORT:
                without = "\n\nWhether it is done, `effort` says: these are its settings then."
            tables.append(f"### `{key}`\n\n{section['description']}{without}\n\n{_table(section, named)}")
    return tables


def _table(schema: Schema, named: Schema) -> str:
    rows = [
        [f"`{key}`", _kind(value), _default(value, key in schema.get("required", ())), _words(value["description"])]
        for key, value in schema["properties"].items()
        if _section(value, named) is None
    ]
    lines = [["key", "what it holds", "default", "meaning"], ["---"] * 4, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _section(value: Schema, named: Schema) -> Schema | None:
    """The dataclass that a key holds, if it holds one."""
    links = [each["$ref"] for each in (value, *value.get("anyOf", ())) if "$ref" in each]
    return named[links[0].rpartition("/")[2]] if links else None


def _kind(value: Schema) -> str:
    if "anyOf" in value:
        unset = {"type": "null"} if value.get("default", 0) is None else None
        return " or ".join(_kind(each) for each in value["anyOf"] if each != unset)
    if "enum" in value:
        return ", ".join(f"`{each}`" for each in value["enum"])
    if value["type"] == "array" and value["items"]["type"] == "integer":
        return "list of whole numbers"
    kind = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "array": "list of names",
        "object": "keys and values",
        "null": "null",
    }[value["type"]]
    bounds = [
        f"{sign} {value[bound]:,}" if isinstance(value[bound], int) else f"{sign} {value[bound]:g}"
        for bound, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if abs(value.get(bound, MOST)) < MOST  # higher ones only keep a computer from trying
    ]
    return f"{kind} {', '.join(bounds)}".strip()


def _default(value: Schema, required: bool) -> str:
    if required:
        return "must be given"
    default = value.get("default", {})
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def _words(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
