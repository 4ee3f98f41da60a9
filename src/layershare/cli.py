"""The command line: a verb is a function. Nothing heavy is imported before a verb runs."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from layershare.errors import LayershareError
from layershare.foreign import reading

if TYPE_CHECKING:
    from layershare.healing.training import Say
    from layershare.recipe import Recipe
    from layershare.run import Report

app = typer.Typer(
    help="Make Hugging Face causal language models smaller by letting their layers share weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console()
complaints = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Hub id, folder, or `sample`, the small model that comes with layershare.")]
Folder = Annotated[str, typer.Argument(help="Folder of a compressed (or any other) model.")]
Out = Annotated[Path, typer.Option("-o", "--output", help="New or empty folder for the result.")]
MethodName = Annotated[
    str,
    typer.Option(
        "--method",
        "-m",
        help="basis-sharing, delta, d-rank, svd-llm, lord, fwsvd, welore, svd, asvd, bolaco, slicegpt, shortgpt, "
        "joint-drop, attention-drop, mlp-drop, block-drop, laco or mka.",
    ),
]
KeepSize = Annotated[str, typer.Option("--keep", "-k", help="What remains: 0.8, 5.4B (parameters) or 11GB.")]
Of = Annotated[str, typer.Option("--of", help="Count `all` parameters, or the compressed `targets` alone.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-O", help="An option of the method, such as group_size=4. Repeatable.")
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Set a recipe's value: calibration.blocks=64. Repeatable.")
]
TextName = Annotated[
    str, typer.Option("--text", "-t", help="wikitext2, c4, ptb, alpaca, stdlib; or a .txt, .jsonl, .parquet or folder.")
]
Blocks = Annotated[int | None, typer.Option("--blocks", help="Number of text blocks.")]
Length = Annotated[int | None, typer.Option("--length", help="Tokens per block (default: the context, up to 2048).")]
StatsFolder = Annotated[
    Path | None, typer.Option("--stats", help="Folder that keeps measured statistics for further runs.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto (an accelerator if there is one), cpu, cuda, …")]


def main() -> None:
    """Entry point: mistakes of the user end in one sentence and exit code 2."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app()
        except LayershareError as error:
            complaints.print(f"Error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            sys.exit(2)


@app.command()
def run(recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")], output: Out, changes: Changes = None) -> None:
    """Carry out a recipe; run again to continue an interrupted run."""
    from layershare.recipe import read_recipe

    _run(read_recipe(recipe, tuple(changes or ())), output)


@app.command()
def compress(
    model: Model,
    output: Out,
    method: MethodName = "basis-sharing",
    keep: KeepSize = "0.8",
    of: Of = "all",
    option: Options = None,
    text: TextName = "wikitext2",
    blocks: Blocks = None,
    length: Length = None,
    stats: StatsFolder = None,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Carry out this plan (edited by hand, say).")] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Then train each block towards the original's (--set refine.epochs=10).")
    ] = False,
    test: Annotated[
        str | None, typer.Option("--eval", help="Measure the result on the held-out part of a text.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    changes: Changes = None,
) -> None:
    """Compress a model into a Hugging Face folder; run again to continue an interrupted run."""
    values = {
        "model": model,
        "method": method,
        "keep": keep,
        "of": of,
        "plan": None if plan_file is None else str(plan_file),
        "dtype": dtype,
        "device": device,
        "calibration": _given(text=text, blocks=blocks, length=length, stats=stats and str(stats)),
        "refine": {} if refine else None,
        "evaluation": None if test is None else _given(text=test, length=length),
    }
    _run(_recipe(values, option, changes), output)


@app.command()
def plan(
    model: Model,
    method: MethodName = "basis-sharing",
    keep: KeepSize = "0.8",
    of: Of = "all",
    option: Options = None,
    stats: Annotated[
        Path | None, typer.Option("--stats", help="Statistics from `calibrate`, for methods that plan by them.")
    ] = None,
    dtype: Dtype = "auto",
    json: Json = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", dir_okay=False, help="Write the plan (JSON) to this file.")
    ] = None,
) -> None:
    """Show what compression would do: groups, ranks, exact sizes, needs; from the model's config alone if it can."""
    from layershare.plan.table import plan_table
    from layershare.run import plan_only
    from layershare.store import write_atomically

    _require_parent(output)
    recipe = _recipe({"model": model, "method": method, "keep": keep, "of": of, "dtype": dtype}, option)
    with _progress() as (report, _):
        job = plan_only(recipe, stats, report)
    assert job.plan is not None
    if output is not None:
        write_atomically(output, job.plan.to_json().encode())
    if json:
        print(job.plan.to_json(), end="")
    else:
        console.print(plan_table(job.spec, job.plan, job.needs))


@app.command()
def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder that keeps the statistics.")],
    text: TextName = "wikitext2",
    blocks: Blocks = None,
    length: Length = None,
    fisher: Annotated[
        bool, typer.Option("--fisher", help="Gradients, too, for fwsvd: needs the whole model in memory.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure a model's statistics on a text, once for many methods and every keep (`compress --stats`)."""
    from layershare.calibrate.stats import STREAMED
    from layershare.run import calibrate_to

    calibration = _given(text=text, blocks=blocks, length=length, stats=str(output))
    with _progress() as (report, _):
        folder = calibrate_to(
            _recipe({"model": model, "dtype": dtype, "device": device, "calibration": calibration}),
            (*STREAMED, "fisher") if fisher else STREAMED,
            report,
        )
    console.print(f"Statistics are in {folder}.", highlight=False, soft_wrap=True)


@app.command()
def heal(
    folder: Annotated[str, typer.Argument(help="Folder of a compressed (or any other) model.")],
    output: Out,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Settings (YAML); options here come before it.")
    ] = None,
    train: Annotated[
        str | None, typer.Option("--train", help="lora (default), factors, norms, full or deltas.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option("--loss", help="ce (default), distill from the original, or both.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the original's blocks by this model's step by step.")
    ] = False,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="The original, if the folder does not name it.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", "-t", help="As for compress; the part to train on.")] = None,
    length: Length = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Train on so many tokens.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Train for so many epochs (default: 1).")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Blocks per step.")] = None,
    search: Annotated[
        int | None, typer.Option("--search", min=1, help="Try so many settings in short trainings first.")
    ] = None,
    test: Annotated[
        str | None, typer.Option("--eval", help="Measure before and after on the held-out part of a text.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, …")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Set a setting: lora.rank=16, compile=true. Repeatable.")
    ] = None,
) -> None:
    """Train a compressed model so that it wins back what it lost; run again to continue an interrupted healing."""
    from accelerate import PartialState

    from layershare.healing.heal import heal_folder
    from layershare.healing.job import prepare_healing
    from layershare.healing.settings import read_healing

    _quiet()
    given = {
        "model": folder,
        "teacher": teacher,
        "train": train,
        "loss.kind": loss,
        "text.text": text,
        "text.length": length,
        "text.tokens": tokens,
        "text.epochs": epochs,
        "optimizer.lr": lr,
        "batch_size": batch_size,
        "search.trials": search,
        "evaluation.text": test,
        "device": device,
    }
    job = prepare_healing(read_healing(recipe, _given(**given), tuple(changes or ()), replace=replace))
    with _progress() as (report, say):
        results = heal_folder(job, output, report=report, say=say)
    if not PartialState().is_main_process:
        return
    for when, evaluation in results["healing"].get("evaluation", {}).items():
        console.print(f"{when.capitalize()} healing:")
        _print_evaluation(evaluation, False)
    console.print(f"The healed model is in {output}.", highlight=False, soft_wrap=True)


@app.command("eval")
def evaluate(
    folder: Folder,
    text: Annotated[
        str | None, typer.Option("--text", "-t", help="As for compress; by default wikitext2, or no text with --tasks.")
    ] = None,
    original: Annotated[str | None, typer.Option("--original", help="Compare with this model.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Zero-shot tasks of lm-eval: arc_easy,piqa; `papers` for the papers' seven."),
    ] = None,
    tasks_data: Annotated[
        Path | None, typer.Option("--tasks-data", help="Folder with TASK.jsonl files (default: from the hub).")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Rows per task.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Blocks, or rows of a task, at once.")] = None,
    blocks: Blocks = None,
    length: Length = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", dir_okay=False, help="Write the results (JSON) to this file.")
    ] = None,
) -> None:
    """Measure perplexity, zero-shot tasks and, against an original, KL divergence and top-1 agreement."""
    from layershare.api import evaluate_folder
    from layershare.store import write_json

    _require_parent(output)
    test = _given(
        blocks=blocks,
        length=length,
        tasks=tasks.split(",") if tasks else None,
        tasks_data=tasks_data and str(tasks_data),
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
    )
    test["text"] = text or (None if tasks else "wikitext2")
    with _progress() as (report, _):
        results = evaluate_folder(
            folder, original, _recipe({"model": folder, "device": device, "evaluation": test}), report
        )
    if output is not None:
        write_json(output, results)
    _print_evaluation(results["evaluation"], json)


@app.command()
def bench(
    folder: Folder,
    original: Annotated[str | None, typer.Option("--original", help="Compare with this model.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=2, help="The batch size beside 1.")] = 8,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens to read (prefill).")] = 128,
    new: Annotated[int, typer.Option("--new", help="Tokens to write (decode).")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds, of which the medians are taken.")] = 5,
    dtype: Dtype = "auto",
    device: Device = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", dir_okay=False, help="Write the results (JSON) to this file, not into the folder."
        ),
    ] = None,
) -> None:
    """Measure speed: prefill and decode, at batch 1 and a larger one, taking turns with an original."""
    from layershare.api import bench_folder
    from layershare.report.listing import speed_table
    from layershare.report.runs import SPEED
    from layershare.store import write_json

    if output is None and not Path(folder).is_dir():
        raise LayershareError(f"'{folder}' is no folder to put {SPEED} into; name a file with -o.")
    file = Path(folder) / SPEED if output is None else output
    _require_parent(file)
    with _progress() as (report, _):
        speed = bench_folder(
            folder,
            original,
            _recipe({"model": folder, "dtype": dtype, "device": device}),
            batches=(1, batch),
            prompt=prompt,
            new=new,
            rounds=rounds,
            report=report,
        )
    write_json(file, speed)
    console.print(speed_table(speed))
    console.print(f"Written to {file}.", highlight=False, soft_wrap=True)


@app.command("report")
def write_report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")] = Path("report.html"),
) -> None:
    """Write a page about finished runs: what was done, sizes, quality, speed, and the best of each size."""
    from layershare.report.page import report

    _require_parent(output)
    report(folders, output)
    console.print(f"The report is in {output}.", highlight=False, soft_wrap=True)


@app.command()
def export(
    folder: Folder,
    output: Out,
    dense: Annotated[
        bool, typer.Option("--dense", help="Multiply the factors out: a checkpoint for everything.")
    ] = False,
) -> None:
    """Write an ordinary dense checkpoint of a compressed model, for programs that cannot load ours."""
    from layershare.api import export_dense

    _quiet()
    if not dense:
        raise LayershareError("A compressed folder is its own export; add --dense to multiply the factors out.")
    export_dense(folder, output)
    console.print(f"The dense model is in {output}.", highlight=False, soft_wrap=True)


@app.command("ls")
def list_models(folder: Annotated[Path, typer.Argument(help="A folder of compressed models.")] = Path()) -> None:
    """List the compressed models below a folder with their sizes and results."""
    from layershare.report.listing import listing

    console.print(listing(folder))


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="The beginning of the text.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens to add.")] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the sampling.")] = 0,
    dtype: Dtype = "auto",
) -> None:
    """Let a model continue a prompt."""
    from layershare.evaluate.generate import continue_text

    _quiet()
    print(continue_text(folder, prompt, tokens=tokens, temperature=temperature, seed=seed, dtype=dtype))


def _run(recipe: "Recipe", output: Path) -> None:
    from layershare.plan.plan import Plan
    from layershare.plan.table import needs_sentence, plan_table
    from layershare.run import prepare, run

    job = prepare(recipe)
    if job.plan is None:
        console.print(needs_sentence(job.needs), highlight=False, soft_wrap=True)
    else:
        console.print(plan_table(job.spec, job.plan, job.needs))
    with _progress() as (report, _):
        results = run(recipe, output, report=report)
    if job.plan is None:
        console.print(plan_table(job.spec, Plan.read(output / "plan.json", job.spec)))
    if "evaluation" in results:
        _print_evaluation(results["evaluation"], False)
    console.print(f"The compressed model is in {output}.", highlight=False, soft_wrap=True)


def _recipe(values: dict[str, Any], options: list[str] | None = None, changes: list[str] | None = None) -> "Recipe":
    from layershare.recipe import changed, make_recipe

    prefixed = [f"options.{option}" for option in options or ()]
    return make_recipe(changed(values, (*prefixed, *(changes or ()))))


def _given(**values: Any) -> dict[str, Any]:
    """The values that are not `None`, so that the recipe's defaults serve for the others."""
    return {key: value for key, value in values.items() if value is not None}


def _print_evaluation(evaluation: dict[str, Any], json: bool) -> None:
    from layershare.report.listing import evaluation_table, tasks_table

    if json:
        console.print_json(data=evaluation)
        return
    if "text" in evaluation:
        console.print(evaluation_table(evaluation))
    if "tasks" in evaluation:
        console.print(tasks_table(evaluation))


@contextmanager
def _progress() -> "Iterator[tuple[Report, Say]]":
    """A bar per step, with the time left, and what prints a line above the bars."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    _quiet()
    columns = (TextColumn("{task.description:<10}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=complaints) as bars:

        def report(step: str):
            task = bars.add_task(step, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield report, lambda line: bars.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _require_parent(file: Path | None) -> None:
    if file is None:
        return
    with reading(f"The file '{file}'", "name another one"):
        if file.exists() and not file.is_file():
            raise OSError("it is no ordinary file")
    if not file.absolute().parent.is_dir():
        raise LayershareError(f"There is no folder '{file.parent}' for '{file.name}'; make it first.")


def _quiet() -> None:
    """Leave the terminal to our own progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    if issubclass(category, UserWarning):
        complaints.print(f"Warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)
