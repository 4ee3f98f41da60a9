"""The command line: a verb is a function. Nothing heavy is imported before a verb runs."""

import json as json_format
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from os.path import isdir
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer
from rich.console import Console

from layershare.console import say, speak_any_encoding
from layershare.errors import LayershareError
from layershare.foreign import reading
from layershare.healing.settings import Healing, Loss
from layershare.recipe import Calibration, Recipe, changed, make_recipe, read_recipe

if TYPE_CHECKING:
    from layershare.bars import Steps
    from layershare.job import Job

app = typer.Typer(
    help="Make Hugging Face causal language models smaller by letting their layers share weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console()
complaints = Console(stderr=True)

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


def _choices(settings: type, key: str) -> Callable[[str], list[str]]:
    """What completes an option that is one of a setting's words."""
    return _one_of(*get_args(get_type_hints(settings)[key]))


def _one_of(*words: str) -> Callable[[str], list[str]]:
    """What completes an option in the shell."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def _text(*names: str, help: str) -> Any:
    """An option that takes a text."""
    known = _one_of("wikitext2", "c4", "ptb", "alpaca", "stdlib")
    return typer.Option(*names, metavar="TEXT", autocompletion=known, help=help)


def _file(help: str) -> Any:
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
        autocompletion=_one_of(*METHOD_NAMES),
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
        autocompletion=_choices(Recipe, "of"),
        help="Count `all` parameters, or the compressed `targets` alone.",
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-O", metavar="KEY=VALUE", help="An option of the method: group_size=4. Repeatable."),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a recipe's value: calibration.blocks=64. Repeatable."),
]
TextName = Annotated[
    str, _text("--text", "-t", help="wikitext2, c4, ptb, alpaca, stdlib; or a .txt, .jsonl, .parquet or folder.")
]
Blocks = Annotated[int | None, typer.Option("--blocks", metavar="N", help="Number of text blocks.")]
Length = Annotated[
    int | None, typer.Option("--length", metavar="N", help="Tokens per block (default: the context, up to 2048).")
]
StatsFolder = Annotated[
    Path | None,
    typer.Option("--stats", metavar="FOLDER", help="Folder that keeps measured statistics for further runs."),
]
Refines = Annotated[
    bool, typer.Option("--refine", help="Then train each block towards the original's (--set refine.epochs=10).")
]
Original = Annotated[str | None, typer.Option("--original", metavar="MODEL", help="Compare with this model.")]
ResultFile = Annotated[Path | None, _file("Write the results (JSON) to this file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        autocompletion=_choices(Recipe, "dtype"),
        help="auto (the checkpoint's), float32, bfloat16 or float16.",
    ),
]
_DEVICE = typer.Option(
    "--device",
    metavar="NAME",
    autocompletion=_one_of("auto", "cpu", "cuda"),
    help="auto (an accelerator if there is one), cpu, cuda or another.",
)
Device = Annotated[str, _DEVICE]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with a model that transformers lacks.")
]


def main() -> None:
    """Entry point: mistakes of the user end in one sentence and exit code 2."""
    speak_any_encoding()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app()
        except LayershareError as error:
            _complain(error)
        except OSError as error:
            if error.filename is None:
                raise
            _complain(LayershareError(f"'{error.filename}' cannot be used ({error.strerror}); name something else."))


def _complain(error: LayershareError) -> None:
    say(complaints, f"Error: {error}", "red")
    sys.exit(2)


def _version(show: bool) -> None:
    if show:
        from layershare import __version__

        print(f"layershare {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options before the verb."""


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).")],
    output: Out,
    changes: Changes = None,
) -> None:
    """Carry out a recipe. The same command continues an interrupted run."""
    _run(read_recipe(recipe, tuple(changes or ())), output)


@app.command()
def compress(
    model: Model,
    output: Out,
    method: MethodName = Recipe.method,
    keep: KeepSize = str(Recipe.keep),
    of: Of = Recipe.of,
    option: Options = None,
    text: TextName = Calibration.text,
    blocks: Blocks = None,
    length: Length = None,
    stats: StatsFolder = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Carry out this plan (edited by hand, say).")
    ] = None,
    refine: Refines = False,
    test: Annotated[str | None, _text("--eval", help="Measure the result on the held-out part of a text.")] = None,
    dtype: Dtype = Recipe.dtype,
    device: Device = Recipe.device,
    trust: Trust = False,
    changes: Changes = None,
) -> None:
    """Compress a model.

    The result is a Hugging Face folder. The same command continues an interrupted run.
    """
    values = {
        "model": model,
        "method": method,
        "keep": keep,
        "of": of,
        "plan": None if plan_file is None else str(plan_file),
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust,
        "calibration": _given(text=text, blocks=blocks, length=length, stats=stats and str(stats)),
        "refine": {} if refine else None,
        "evaluation": None if test is None else {"text": test},
    }
    _run(_recipe(values, option, changes), output)


@app.command()
def plan(
    model: Model,
    method: MethodName = Recipe.method,
    keep: KeepSize = str(Recipe.keep),
    of: Of = Recipe.of,
    option: Options = None,
    stats: Annotated[
        Path | None,
        typer.Option("--stats", metavar="FOLDER", help="Statistics from `calibrate`, for methods that plan by them."),
    ] = None,
    text: TextName = Calibration.text,
    blocks: Blocks = None,
    length: Length = None,
    refine: Refines = False,
    dtype: Dtype = Recipe.dtype,
    device: Device = Recipe.device,
    changes: Changes = None,
    trust: Trust = False,
    json: Json = False,
    output: Annotated[Path | None, _file("Write the plan (JSON) to this file.")] = None,
) -> None:
    """Show what compress would do and need.

    Groups, ranks, exact sizes, time, memory and disk; from the model's config alone if the method can.
    """
    from layershare.job import plan_only, speed_for
    from layershare.plan.table import plan_table

    _require_parent(output)
    values = {
        "model": model,
        "method": method,
        "keep": keep,
        "of": of,
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust,
        "calibration": _given(text=text, blocks=blocks, length=length),
        "refine": {} if refine else None,
    }
    recipe = _recipe(values, option, changes)
    with _progress() as (announce, _):
        job = plan_only(recipe, stats, announce)
    assert job.plan is not None
    if json:
        _print_json(asdict(job.plan))
    else:
        console.print(plan_table(job.spec, job.plan, job.needs, speed_for(job)))
    if output is not None:
        _write(output, job.plan.to_json())


@app.command()
def methods(json: Json = False) -> None:
    """Show the methods, and what each needs."""
    from layershare.methods.catalogue import catalogue
    from layershare.report.listing import methods_table

    entries = catalogue()
    if json:
        _print_json([asdict(entry) for entry in entries])
    else:
        console.print(methods_table(entries))


@app.command()
def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Folder that keeps the statistics.")],
    text: TextName = Calibration.text,
    blocks: Blocks = None,
    length: Length = None,
    gradients: Annotated[
        bool, typer.Option(help="Gradients at the outputs of matrices, which auto plans by: three times the work.")
    ] = True,
    fisher: Annotated[
        bool, typer.Option("--fisher", help="Gradients of weights, too, for fwsvd: needs the whole model in memory.")
    ] = False,
    dtype: Dtype = Recipe.dtype,
    device: Device = Recipe.device,
    trust: Trust = False,
) -> None:
    """Measure a model on a text, for many runs.

    All methods and every keep share the statistics (`compress --stats`).
    """
    from layershare.calibrate.stats import STREAMED
    from layershare.run import calibrate_to

    calibration = _given(text=text, blocks=blocks, length=length, stats=str(output))
    where = {"dtype": dtype, "device": device, "trust_remote_code": trust}
    with _progress() as (announce, _):
        folder = calibrate_to(
            _recipe({"model": model, "calibration": calibration, **where}),
            (*STREAMED, *(["gradients"] if gradients else ()), *(["fisher"] if fisher else ())),
            announce,
        )
    say(console, f"Statistics are in {folder}.")


@app.command()
def heal(
    folder: Folder,
    output: Out,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="Settings (YAML); options here come before it.")
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            "--train",
            metavar="WHAT",
            autocompletion=_choices(Healing, "train"),
            help="lora (default), factors, norms, full or deltas.",
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            "--loss",
            metavar="NAME",
            autocompletion=_choices(Loss, "kind"),
            help="ce (default), distill from the original, or both.",
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the original's blocks by this model's step by step.")
    ] = False,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="MODEL", help="The original, if the folder does not name it.")
    ] = None,
    text: Annotated[str | None, _text("--text", "-t", help="As for compress; the part to train on.")] = None,
    length: Length = None,
    tokens: Annotated[int | None, typer.Option("--tokens", metavar="N", help="Train on so many tokens.")] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", metavar="N", help="Train for so many epochs (default: 1).")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", metavar="RATE", help="Learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", metavar="N", help="Blocks per step.")] = None,
    search: Annotated[
        int | None, typer.Option("--search", metavar="N", min=1, help="Try so many settings in short trainings first.")
    ] = None,
    test: Annotated[
        str | None, _text("--eval", help="Measure before and after on the held-out part of a text.")
    ] = None,
    device: Annotated[str | None, _DEVICE] = None,
    trust: Trust = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a setting: lora.rank=16, compile=true. Repeatable."),
    ] = None,
) -> None:
    """Win back by training what compression lost.

    Leaves another Hugging Face folder; the same command continues an interrupted healing.
    """
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
        "trust_remote_code": trust or None,
    }
    job = prepare_healing(read_healing(recipe, _given(**given), tuple(changes or ()), replace=replace))
    with _progress() as (announce, tell):
        results = heal_folder(job, output, announce=announce, say=tell)
    if not PartialState().is_main_process:
        return
    for when, evaluation in results["healing"].get("evaluation", {}).items():
        console.print(f"{when.capitalize()} healing:")
        _print_evaluation(evaluation, False)
    say(console, f"The healed model is in {output}.")


@app.command("eval")
def evaluate(
    folder: Folder,
    text: Annotated[
        str | None, _text("--text", "-t", help="As for compress; by default wikitext2, or no text with --tasks.")
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

    _require_parent(output)
    test = _given(
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
    with _progress() as (announce, _):
        values = {"model": folder, "device": device, "trust_remote_code": trust, "evaluation": test}
        results = evaluate_folder(folder, original, _recipe(values), announce)
    _print_evaluation(results["evaluation"], json)
    if output is not None:
        _write(output, to_json(results))


@app.command()
def bench(
    folder: Folder,
    original: Original = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=2, help="The batch size beside 1.")] = 8,
    prompt: Annotated[int, typer.Option("--prompt", metavar="N", help="Tokens to read (prefill).")] = 128,
    new: Annotated[int, typer.Option("--new", metavar="N", help="Tokens to write (decode).")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="Rounds, of which the medians are taken.")] = 5,
    dtype: Dtype = Recipe.dtype,
    device: Device = Recipe.device,
    trust: Trust = False,
    output: Annotated[Path | None, _file("Write the results (JSON) to this file, not into the folder.")] = None,
) -> None:
    """Measure the speed of a model.

    Prefill and decode, at batch 1 and a larger one, taking turns with an original.
    """
    from layershare.api import bench_folder
    from layershare.model.source import read_config
    from layershare.report.listing import speed_table
    from layershare.report.runs import SPEED
    from layershare.store import to_json

    read_config(folder)
    if output is None and not Path(folder).is_dir():
        raise LayershareError(f"'{folder}' is no folder to put {SPEED} into; name a file with -o.")
    file = Path(folder) / SPEED if output is None else output
    _require_parent(file)
    with _progress() as (announce, _):
        speed = bench_folder(
            folder,
            original,
            _recipe({"model": folder, "dtype": dtype, "device": device, "trust_remote_code": trust}),
            batches=(1, batch),
            prompt=prompt,
            new=new,
            rounds=rounds,
            announce=announce,
        )
    console.print(speed_table(speed))
    _write(file, to_json(speed))
    say(console, f"Written to {file}.")


@app.command("report")
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", hidden=True)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write.")] = Path(
        "report.html"
    ),
) -> None:
    """Write a page about finished runs.

    What was done in each FOLDER, sizes, quality, speed, and the best of each size.
    """
    from layershare.report.page import write_report

    _require_parent(output)
    write_report(folders, output)
    say(console, f"The report is in {output}.")


@app.command()
def export(
    folder: Folder,
    output: Out,
    dense: Annotated[
        bool, typer.Option("--dense", help="Multiply the factors out: a checkpoint for everything.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Make a compressed model a dense one.

    That is an ordinary checkpoint, for programs that cannot load ours.
    """
    from layershare.api import export_dense

    _quiet()
    if not dense:
        raise LayershareError("A compressed folder is its own export; add --dense to multiply the factors out.")
    export_dense(folder, output, trust_remote_code=trust)
    say(console, f"The dense model is in {output}.")


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="Folder that layershare wrote.")]) -> None:
    """Check that a folder is as it was written.

    Every file and every tensor that layershare wrote there is compared with its checksum in manifest.json.
    """
    from layershare.manifest import verify

    say(console, str(verify(folder)))


@app.command("ls")
def list_models(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of compressed models.")] = Path(),
) -> None:
    """List the models below a folder.

    All that were compressed, with sizes and results.
    """
    from layershare.report.listing import listing

    table, unreadable = listing(folder)
    console.print(table)
    for sentence in unreadable:
        say(console, sentence)


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The beginning of the text.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", metavar="N", min=1, help="Tokens to add.")] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", min=0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, max=2**32 - 1, help="Seed of the sampling.")] = 0,
    dtype: Dtype = Recipe.dtype,
    device: Device = Recipe.device,
    trust: Trust = False,
) -> None:
    """Let a model continue a prompt."""
    from layershare.device import device_of
    from layershare.evaluate.generate import continue_text

    if isdir(prompt) and not isdir(folder):  # unlike pathlib's, these take text that is too long for a name
        raise LayershareError(f"'{prompt}' is a folder, '{folder}' is none: name the model first, then the prompt.")
    _quiet()
    options: dict[str, Any] = {"temperature": temperature, "seed": seed, "dtype": dtype}
    place = device_of(device)
    print(continue_text(folder, prompt, tokens=tokens, device=place, trust_remote_code=trust, **options))


def _run(recipe: Recipe, output: Path) -> None:
    from layershare.job import speed_for
    from layershare.plan.plan import Plan
    from layershare.plan.table import needs_sentence, plan_table
    from layershare.run import run

    planned: list[Job] = []

    def show(job: "Job") -> None:
        planned.append(job)
        speed = speed_for(job)
        if job.plan is None:
            say(console, needs_sentence(job.needs, speed))
        else:
            console.print(plan_table(job.spec, job.plan, job.needs, speed))

    with _progress() as (announce, _):
        results = run(recipe, output, announce=announce, show=show)
    if planned and planned[0].plan is None:
        console.print(plan_table(planned[0].spec, Plan.read(output / "plan.json", planned[0].spec)))
    if "evaluation" in results:
        _print_evaluation(results["evaluation"], False)
    say(console, f"The compressed model is in {output}.")


def _recipe(values: dict[str, Any], options: list[str] | None = None, changes: list[str] | None = None) -> Recipe:
    prefixed = [f"options.{option}" for option in options or ()]
    return make_recipe(changed(values, (*prefixed, *(changes or ()))))


def _given(**values: Any) -> dict[str, Any]:
    """The values that are not `None`, so that the recipe's defaults serve for the others."""
    return {key: value for key, value in values.items() if value is not None}


def _print_evaluation(evaluation: dict[str, Any], json: bool) -> None:
    from layershare.report.listing import evaluation_table, tasks_table

    if json:
        _print_json(evaluation)
        return
    if "text" in evaluation:
        console.print(evaluation_table(evaluation))
    if "tasks" in evaluation:
        console.print(tasks_table(evaluation))


def _write(file: Path, text: str) -> None:
    from layershare.disk import OTHER_FILE, writing
    from layershare.store import write_atomically

    with writing(file, OTHER_FILE):
        write_atomically(file, text.encode())


def _progress() -> "Steps":
    """How far the steps are, on standard error; other libraries' bars are silenced."""
    from layershare.bars import steps

    _quiet()
    return steps(complaints)


def _print_json(value: Any) -> None:
    """Print JSON, in ASCII."""
    print(json_format.dumps(value, indent=1))


def _require_parent(file: Path | None) -> None:
    if file is None:
        return
    with reading(f"The file '{file}'", "name another one"):
        file.exists()  # or no file can be called so
    if not file.absolute().parent.is_dir():
        raise LayershareError(f"There is no folder '{file.parent}' for '{file.name}'; make it first.")


def _quiet() -> None:
    """Leave the terminal to our own progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    if issubclass(category, UserWarning):
        say(complaints, f"Warning: {message}", "yellow")
