"""The verbs that make a smaller model, and those that prepare it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layershare.cli.options import (
    BitsOffered,
    Blocks,
    Changes,
    Device,
    Dtype,
    Efforts,
    Json,
    KeepSize,
    Length,
    MethodName,
    Model,
    Of,
    Options,
    Out,
    StatsFolder,
    TextName,
    Trust,
    file_option,
    given,
    recipe_of,
    text_option,
)
from layershare.cli.output import print_evaluation, print_json, progress, require_parent, show, tell, write
from layershare.recipe import Calibration, Recipe, read_recipe

if TYPE_CHECKING:
    from layershare.job import Job


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).")],
    output: Out,
    changes: Changes = None,
) -> None:
    """Carry out a recipe. The same command continues an interrupted run."""
    _carry_out(read_recipe(recipe, tuple(changes or ())), output)


def compress(
    model: Model,
    output: Out,
    method: MethodName = Recipe.method,
    keep: KeepSize = str(Recipe.keep),
    of: Of = Recipe.of,
    bits: BitsOffered = None,
    option: Options = None,
    text: TextName = Calibration.text,
    blocks: Blocks = None,
    length: Length = None,
    stats: StatsFolder = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Carry out this plan (edited by hand, say).")
    ] = None,
    effort: Efforts = Recipe.effort,
    test: Annotated[
        str | None, text_option("--eval", help="Measure the result on the held-out part of a text.")
    ] = None,
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
        "calibration": given(text=text, blocks=blocks, length=length, stats=stats and str(stats)),
        "effort": effort,
        "evaluation": None if test is None else {"text": test},
    }
    _carry_out(recipe_of(values, option, changes, bits), output)


def plan(
    model: Model,
    method: MethodName = Recipe.method,
    keep: KeepSize = str(Recipe.keep),
    of: Of = Recipe.of,
    bits: BitsOffered = None,
    option: Options = None,
    stats: Annotated[
        Path | None,
        typer.Option("--stats", metavar="FOLDER", help="Statistics from `calibrate`, for methods that plan by them."),
    ] = None,
    text: TextName = Calibration.text,
    blocks: Blocks = None,
    length: Length = None,
    effort: Efforts = Recipe.effort,
    dtype: Dtype = Recipe.dtype,
    device: Device = Recipe.device,
    changes: Changes = None,
    trust: Trust = False,
    json: Json = False,
    output: Annotated[Path | None, file_option("Write the plan (JSON) to this file.")] = None,
) -> None:
    """Show what compress would do and need.

    Groups, ranks, exact sizes, time, memory and disk; from the model's config alone if the method can.
    """
    from layershare.job import missing_to_plan, planned, prepare, speed_for
    from layershare.plan.table import needs_sentence, plan_table

    require_parent(output)
    values = {
        "model": model,
        "method": method,
        "keep": keep,
        "of": of,
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust,
        "calibration": given(text=text, blocks=blocks, length=length),
        "effort": effort,
    }
    recipe = recipe_of(values, option, changes, bits)
    job = prepare(recipe)
    missing = missing_to_plan(job, stats)
    if missing is not None and not json and output is None:
        tell(f"{missing} {needs_sentence(job.needs, speed_for(job))}")
        return
    with progress() as (announce, _):
        job = planned(job, stats, announce)
    assert job.plan is not None
    if json:
        print_json(job.plan)
    else:
        show(plan_table(job.spec, job.plan, job.needs, speed_for(job)))
    if output is not None:
        write(output, job.plan.to_json())


def methods(json: Json = False) -> None:
    """Show the methods, and what each needs."""
    from layershare.methods.catalogue import catalogue
    from layershare.report.listing import methods_table

    entries = catalogue()
    if json:
        print_json(entries)
    else:
        show(methods_table(entries))


def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Folder that keeps the statistics.")],
    text: TextName = Calibration.text,
    blocks: Blocks = None,
    length: Length = None,
    gradients: Annotated[
        bool, typer.Option(help="What auto plans by: gradients, and two plans that are tried. Four times the work.")
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

    calibration = given(text=text, blocks=blocks, length=length, stats=str(output))
    where = {"dtype": dtype, "device": device, "trust_remote_code": trust}
    with progress() as (announce, _):
        folder = calibrate_to(
            recipe_of({"model": model, "calibration": calibration, **where}),
            (*STREAMED, *(["gradients"] if gradients else ()), *(["fisher"] if fisher else ())),
            announce,
        )
    tell(f"Statistics are in {folder}.")


def _carry_out(recipe: Recipe, output: Path) -> None:
    from layershare.job import speed_for
    from layershare.plan.plan import Plan
    from layershare.plan.table import needs_sentence, plan_table
    from layershare.report.words import compared
    from layershare.run import run

    planned: list[Job] = []

    def show_plan(job: "Job") -> None:
        planned.append(job)
        speed = speed_for(job)
        if job.plan is None:
            tell(needs_sentence(job.needs, speed))
        else:
            show(plan_table(job.spec, job.plan, job.needs, speed))

    with progress() as (announce, _):
        results = run(recipe, output, announce=announce, show=show_plan)
    if planned and planned[0].plan is None:
        show(plan_table(planned[0].spec, Plan.read(output / "plan.json", planned[0].spec)))
    if results.held_out is not None:
        tell(f"{compared(results.held_out)}.")
    if results.evaluation is not None:
        print_evaluation(results.evaluation)
    tell(f"The compressed model is in {output}.")
