"""Options that several verbs have, what completes them in the shell, and the recipe that their values make."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from layershare.errors import LayershareError
from layershare.recipe import Recipe, changed, make_recipe

METHOD_NAMES = (
    "auto",
    "basis-sharing",
    "d-rank",
    "svd-llm",
    "lord",
    "fwsvd",
    "welore",
    "svd",
    "asvd",
    "bolaco",
    "delta",
    "slicegpt",
    "shortgpt",
    "joint-drop",
    "attention-drop",
    "mlp-drop",
    "block-drop",
    "laco",
    "mka",
)
"""Those of `layershare.methods`, which imports torch."""


def choices(settings: type, key: str) -> Callable[[str], list[str]]:
    """What completes an option that is one of a setting's words."""
    return one_of(*get_args(get_type_hints(settings)[key]))


def one_of(*words: str) -> Callable[[str], list[str]]:
    """What completes an option in the shell."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def text_option(*names: str, help: str) -> Any:
    """An option that takes a text."""
    known = one_of("wikitext2", "c4", "ptb", "alpaca", "stdlib")
    return typer.Option(*names, metavar="TEXT", autocompletion=known, help=help)


def file_option(help: str) -> Any:
    """The option for a file that is written."""
    return typer.Option("-o", "--output", metavar="FILE", dir_okay=False, help=help)


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Hub id, folder, or `sample`, the small model that comes with layershare."),
]
Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of a compressed (or any other) model.")]
Out = Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="New or empty folder for the result.")]
MethodName = Annotated[
    str,
    typer.Option(
        "--method",
        "-m",
        metavar="NAME",
        autocompletion=one_of(*METHOD_NAMES),
        help=f"{', '.join(METHOD_NAMES[:-1])} or {METHOD_NAMES[-1]}; `layershare methods` tells what they do.",
    ),
]
KeepSize = Annotated[
    str, typer.Option("--keep", "-k", metavar="SIZE", help="What remains: 0.8, 5.4B (parameters) or 11GB.")
]
Of = Annotated[
    str,
    typer.Option(
        "--of",
        metavar="WHAT",
        autocompletion=choices(Recipe, "of"),
        help="Count `all` parameters, the compressed `targets` alone, or `multiplications` per token.",
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-O", metavar="KEY=VALUE", help="An option of the method: group_size=4. Repeatable."),
]
BitsOffered = Annotated[
    str | None,
    typer.Option(
        "--bits", metavar="N,N", help="Plan bits as well as ranks (auto): 2,3,4,6, say. --keep counts bytes then."
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a recipe's value: calibration.blocks=64. Repeatable."),
]
TextName = Annotated[
    str, text_option("--text", "-t", help="wikitext2, c4, ptb, alpaca, stdlib; or a .txt, .jsonl, .parquet or folder.")
]
Blocks = Annotated[int | None, typer.Option("--blocks", metavar="N", help="Number of text blocks.")]
Length = Annotated[
    int | None, typer.Option("--length", metavar="N", help="Tokens per block (default: the context, up to 2048).")
]
StatsFolder = Annotated[
    Path | None,
    typer.Option("--stats", metavar="FOLDER", help="Folder that keeps measured statistics for further runs."),
]
Efforts = Annotated[
    str,
    typer.Option(
        "--effort",
        metavar="NAME",
        autocompletion=choices(Recipe, "effort"),
        help="Train what is solved: closed (not at all), blocks (each towards the original's) or distill (blocks, then "
        "the whole model).",
    ),
]
Original = Annotated[str | None, typer.Option("--original", metavar="MODEL", help="Compare with this model.")]
ResultFile = Annotated[Path | None, file_option("Write the results (JSON) to this file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        autocompletion=choices(Recipe, "dtype"),
        help="auto (the checkpoint's), float32, bfloat16 or float16.",
    ),
]
DEVICE = typer.Option(
    "--device",
    metavar="NAME",
    autocompletion=one_of("auto", "cpu", "cuda"),
    help="auto (an accelerator if there is one), cpu, cuda or another.",
)
Device = Annotated[str, DEVICE]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with a model that transformers lacks.")
]


def recipe_of(
    values: dict[str, Any], options: list[str] | None = None, changes: list[str] | None = None, bits: str | None = None
) -> Recipe:
    """The recipe of these values, with options of the method, `bits` among them, and then changes, each `KEY=VALUE`.

    Raises `LayershareError` as `make_recipe`, and for bits with a method that does not plan them.
    """
    if bits is not None and values["method"] != "auto":
        raise LayershareError(
            f"'{values['method']}' does not plan bits: `--set quantize.bits=4` stores all that it leaves as integers."
        )
    prefixed = [f"options.{option}" for option in (*(options or ()), *([f"bits={bits}"] if bits is not None else ()))]
    return make_recipe(changed(values, (*prefixed, *(changes or ()))))


def given(**values: Any) -> dict[str, Any]:
    """The values that are not `None`, so that the recipe's defaults serve for the others."""
    return {key: value for key, value in values.items() if value is not None}
