"""The verbs that measure a model's quality and speed."""

from pathlib import Path
from typing import Annotated

import typer

from layershare.cli.options import (
    Blocks,
    Device,
    Dtype,
    Folder,
    Json,
    Length,
    Original,
    ResultFile,
    Trust,
    file_option,
    given,
    recipe_of,
    text_option,
)
from layershare.cli.output import print_evaluation, print_json, progress, require_parent, show, tell, write
from layershare.errors import LayershareError
from layershare.recipe import Recipe


def evaluate(
    folder: Folder,
    text: Annotated[
        str | None, text_option("--text", "-t", help="As for compress; by default wikitext2, or no text with --tasks.")
    ] = None,
    original: Original = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAMES",
            help="Zero-shot tasks of lm-eval: arc_easy,piqa; `papers` for the papers' seven.",
        ),
    ] = None,
    tasks_data: Annotated[
        Path | None,
        typer.Option("--tasks-data", metavar="FOLDER", help="Folder with TASK.jsonl files (default: from the hub)."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help="Rows per task.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", help="Blocks, or rows of a task, at once.")
    ] = None,
    blocks: Blocks = None,
    length: Length = None,
    dtype: Dtype = Recipe.dtype,
    device: Device = Recipe.device,
    trust: Trust = False,
    json: Json = False,
    output: ResultFile = None,
) -> None:
    """Measure the quality of a model.

    Perplexity, zero-shot tasks and, against an original, KL divergence and top-1 agreement.
    """
    from layershare.api import evaluate_folder
    from layershare.store import to_json

    require_parent(output)
    test = given(
        blocks=blocks,
        length=length,
        tasks=tasks,
        tasks_data=tasks_data and str(tasks_data),
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
    )
    if text is not None or tasks is not None:
        test["text"] = text
    with progress() as (announce, _):
        values = {"model": folder, "device": device, "trust_remote_code": trust, "evaluation": test}
        results = evaluate_folder(folder, original, recipe_of(values), announce)
    if json:
        print_json(results.evaluation)
    else:
        print_evaluation(results.evaluation)
    if output is not None:
        write(output, to_json(results))


def bench(
    folder: Folder,
    original: Original = None,
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAME", help="What runs the models: transformers or vllm.")
    ] = "transformers",
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", metavar="N", min=1, help="Prompts at once (default: 1, 8); repeatable."),
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt", metavar="N", help="Tokens to read (prefill).")] = 128,
    new: Annotated[int, typer.Option("--new", metavar="N", help="Tokens to write (decode).")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="Rounds, of which the medians are taken.")] = 5,
    dtype: Dtype = Recipe.dtype,
    device: Device = Recipe.device,
    trust: Trust = False,
    output: Annotated[Path | None, file_option("Write the results (JSON) to this file, not into the folder.")] = None,
) -> None:
    """Measure the speed of a model.

    Prefill and decode, in transformers or vLLM, taking turns with an original.
    """
    from layershare.api import bench_folder
    from layershare.evaluate.speed import Workload
    from layershare.model.source import read_config
    from layershare.report.listing import speed_table
    from layershare.report.runs import SPEED
    from layershare.store import to_json

    read_config(folder, trust_remote_code=trust)
    if output is None and not Path(folder).is_dir():
        raise LayershareError(f"'{folder}' is no folder to put {SPEED} into; name a file with -o.")
    file = Path(folder) / SPEED if output is None else output
    require_parent(file)
    workload = Workload(tuple(batch) if batch else Workload.batches, prompt, new, rounds)
    recipe = recipe_of({"model": folder, "dtype": dtype, "device": device, "trust_remote_code": trust})
    with progress() as (announce, _):
        speed = bench_folder(folder, original, recipe, workload, engine, announce)
    show(speed_table(speed))
    write(file, to_json(speed))
    tell(f"Written to {file}.")
