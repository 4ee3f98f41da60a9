"""One run: calibrate, plan, solve, refit, train, quantize, write, measure, publish. Killed, the same call continues."""

import shutil
import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layershare.calibrate.stats import STREAMED, Statistic, calibrate
from layershare.calibrate.text import NAMED, Source, Split, Text, read_documents, text_digest
from layershare.device import device_of, dtype_of
from layershare.disk import require_disk, still_needed, writing
from layershare.errors import LayershareError
from layershare.evaluate.evaluator import Evaluator, Measured, load_evaluator
from layershare.evaluate.generate import compare_samples
from layershare.folders import AGAIN, WORK, is_finished, publish, require_stats_folder, work_folder
from layershare.foreign import reading
from layershare.formulas.linalg import REFIT_RIDGE, RIDGE
from layershare.job import Job, load_and_hold_out, load_with_spare, open_weights, prepare
from layershare.methods import make_method
from layershare.model.describe import describe
from layershare.model.hub import load
from layershare.model.original import files_of, known_of, located, source_of
from layershare.model.source import read_config, read_tokenizer, tokenizer_of
from layershare.model.weights import Weights
from layershare.plan.edits import quantized, sharing
from layershare.plan.evidence import Evidence
from layershare.plan.needs import estimate_needs
from layershare.plan.plan import Plan
from layershare.progress import Announce, Clock, Progress, no_progress, silent
from layershare.recipe import Recipe
from layershare.report.page import write_pages
from layershare.report.results import (
    DISTILLED,
    QUANTIZED,
    REFINED,
    REFITTED,
    RESULTS,
    CalibrationText,
    Environment,
    HeldOutText,
    Results,
    Solved,
    read_as,
    shapes,
)
from layershare.solve.write import write_model
from layershare.steps import Context, as_integers, distilled, measuring_held_out, own_plan, refined, settled
from layershare.store import make_folder, write_json
from layershare.trials import try_plans


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: Source | None = None,
    announce: Announce = silent,
    show: Callable[[Job], None] = lambda job: None,
    pages: bool = True,
) -> Results:
    """Carry out a recipe and leave a Hugging Face folder in `out`; returns its results, as in `results.json`.

    A model in memory may be given in place of the recipe's, as may a tokenizer and a calibration text. The model is not
    changed. `show` is given the job, with its plan, before anything of it is done. `pages`: with a model card and a
    page to read. The same call continues an interrupted run, and returns at once if the run is finished. Raises
    `LayershareError` for bad input, before anything is written.
    """
    out = Path(out)
    if model is None:
        recipe = replace(recipe, model=located(recipe.model))
    make_method(recipe.method, recipe.options)  # refuses what could not stand in a recipe
    if is_finished(out, recipe.to_yaml()):
        return _finished(recipe, out, model, tokenizer)
    job = prepare(recipe, model)
    tokenizer, calibration, held_out, training, evaluator = _texts(job, model, tokenizer, text)
    stats = out if recipe.calibration.stats is None else require_stats_folder(Path(recipe.calibration.stats))
    needs = {out: job.needs.output, stats: job.needs.stats + (job.needs.output if stats == out else 0)}
    require_disk({place: still_needed(size, place) for place, size in needs.items()})

    with work_folder(out, recipe.to_yaml(), needed=job.needs.output) as work:
        if model is None:
            scratch = work / "scratch"
            shutil.rmtree(scratch, ignore_errors=True)
            weights = open_weights(recipe, job.config, scratch)
            job = prepare(recipe, weights)  # with the dtypes that the weights really have
        else:
            weights = Weights.of(model)
        weights.require_sound()
        show(job)
        clock = Clock(announce)
        context = Context(job, work, weights, model, tokenizer, calibration, held_out, training, evaluator, clock)
        results = _carry_out(context)
        if pages:
            write_pages(context.staging, out.absolute().name)
        publish(context.staging, out)
        return results


def _finished(
    recipe: Recipe, out: Path, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
) -> Results:
    """The results of a finished run of this recipe.

    Raises `LayershareError` if it was of another model, plan or text: what is in memory or on this machine may have
    changed since.
    """
    with reading(f"The {RESULTS} in '{out}'", AGAIN):
        results = read_as(Results, out / RESULTS)
    if _fingerprint(recipe, model) not in (None, results.model_fingerprint):
        raise LayershareError(f"The folder '{out}' holds a finished run of another model; name another folder.")
    texts: list[tuple[str | None, Split, str | None]] = []
    if results.calibration is not None:
        texts.append((recipe.calibration.text, "train", results.calibration.text_sha256))
    if recipe.evaluation is not None and results.evaluation is not None and results.evaluation.text is not None:
        texts.append((recipe.evaluation.text, "test", results.evaluation.text.text_sha256))
    for source, split, known in texts:
        if source is not None and source not in NAMED and Path(source).exists():
            tokenizer = tokenizer or _tokenizer(recipe, model)
            if text_digest(read_documents(source, split, tokenizer)[1]) != known:
                raise LayershareError(f"'{source}' has changed since the finished run in '{out}'; name another folder.")
    if recipe.plan is not None and Plan.from_file(recipe.plan).edits != Plan.from_file(out / "plan.json").edits:
        raise LayershareError(
            f"'{recipe.plan}' has changed since the finished run in '{out}'; delete that or name another folder."
        )
    shutil.rmtree(out / WORK, ignore_errors=True)
    warnings.warn(f"'{out}' holds this very run, finished {results.date}: nothing was done.", stacklevel=3)
    return results


def _fingerprint(recipe: Recipe, model: PreTrainedModel | None) -> str | None:
    """That of a model in memory or in a folder; `None` for one of the hub, which may be out of reach."""
    if model is not None:
        return Weights.of(model).fingerprint
    if not Path(recipe.model).is_dir():
        return None
    config = read_config(recipe.model, trust_remote_code=recipe.trust_remote_code)
    with TemporaryDirectory() as scratch:
        return open_weights(recipe, config, Path(scratch)).fingerprint


def _tokenizer(recipe: Recipe, model: PreTrainedModel | None) -> PreTrainedTokenizerBase:
    """That of the model."""
    if model is not None:
        return tokenizer_of(model)
    return read_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)


def _texts(
    job: Job, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None, text: Source | None
) -> tuple[PreTrainedTokenizerBase | None, Text | None, Text | None, Text | None, Evaluator | None]:
    """The tokenizer, what to calibrate on, to try choices, to train and to measure on, each as far as it is needed."""
    recipe, config = job.recipe, job.config
    if tokenizer is None and (model is None or job.calibrated or recipe.evaluation is not None):
        tokenizer = _tokenizer(recipe, model)
    calibration = held_out = training = evaluator = None
    if job.calibrated:
        assert tokenizer is not None
        source = recipe.calibration, tokenizer, config, text
        if job.holds_out:
            calibration, held_out = load_and_hold_out(*source)
        else:
            calibration, _ = load_with_spare(*source)
        if job.plan is None:
            job.method.require_blocks(len(calibration.tokens))
    if recipe.distill is not None:
        from layershare.healing.within import training_text  # the Trainer takes seconds to import

        assert tokenizer is not None
        assert calibration is not None
        assert held_out is not None
        training = training_text(recipe, tokenizer, config, text, calibration, held_out)
    if recipe.evaluation is not None:
        assert tokenizer is not None
        evaluator = load_evaluator(recipe.evaluation, tokenizer, config)
        tested = evaluator.text
        if calibration is not None and tested is not None and calibration.text_sha256 == tested.text_sha256:
            warnings.warn("The model is measured on the very text that it is compressed for.", stacklevel=3)
    return tokenizer, calibration, held_out, training, evaluator


def _carry_out(run: Context) -> Results:
    """The steps of a run, which leave all but the pages in `staging`; returns the results."""
    job, recipe, clock = run.job, run.job.recipe, run.clock
    shutil.rmtree(run.staging, ignore_errors=True)
    run.staging.mkdir()
    own = own_plan(run)
    with clock.step("solve") as progress:
        factored = own.solved(run, progress)
    held_out = measuring_held_out(run, factored)
    chosen, factored, label = settled(run, own, factored, held_out)
    plan, fitted, trains = chosen.plan, label == REFITTED, bool(sharing(chosen.plan.edits))
    trained = taught = None
    if recipe.effort != "closed" and not trains:
        warnings.warn("The plan leaves no factors that could be trained, so nothing is.", stacklevel=3)
    if recipe.refine is not None and trains:
        assert held_out is not None
        factored, trained = refined(run, recipe.refine, chosen, factored, label, fitted, held_out)
        label = REFINED if trained.kept else label
    if recipe.distill is not None and trains:
        assert held_out is not None
        factored, taught = distilled(run, recipe.distill, chosen, factored, label, held_out)
        label = DISTILLED if taught.kept else label
    if quantized(plan.edits):
        with clock.step("quantize") as progress:
            factored = as_integers(run, chosen, factored, label, progress)
            if held_out is not None:
                stored = label if job.method.offered_bits else QUANTIZED
                held_out.divergence(stored, lambda: factored, no_progress)
    source = recipe.model if run.model is None else source_of(run.model)
    beside = None if source is None else files_of(source)
    with clock.step("write"):
        write_model(factored, recipe, run.tokenizer, run.staging, beside)
    measured = samples = compared = None
    if held_out is not None:
        told = {"chosen": chosen.label, "kl": held_out.found, "expected": own.plan.expected_kl}
        compared = HeldOutText(**held_out.text.identity, **told)
    if run.evaluator is not None:
        with clock.step("evaluate") as progress:
            measured, samples = _measure(run, run.evaluator, progress)
    text, seed = run.calibration, recipe.calibration.seed
    results = Results(
        model=recipe.model,
        original={} if source is None else known_of(source, beside),
        model_fingerprint=run.weights.fingerprint,
        method=plan.method,
        options=plan.options,
        keep=plan.keep,
        of=plan.of,
        before=plan.before,
        after=plan.after,
        calibration=None if text is None else CalibrationText(**text.identity, seed=seed),
        ridge=RIDGE,
        refit=fitted,
        refit_ridge=REFIT_RIDGE,
        refine=trained,
        distill=taught,
        groups={name: Solved.of(facts) for name, facts in factored.facts().items()},
        shapes=shapes(job.spec),
        held_out=compared,
        evaluation=measured,
        samples=samples,
        seconds=clock.seconds,
        **vars(Environment.here(*(run.evaluator.packages if run.evaluator else ()))),
    )
    write_json(run.staging / RESULTS, results)
    return results


def _measure(run: Context, evaluator: Evaluator, progress: Progress) -> tuple[Measured, list[dict[str, str]] | None]:
    """What is measured of the finished folder against the original, and samples if it is on a text."""
    recipe, device = run.job.recipe, device_of(run.job.recipe.device)
    trust: dict[str, Any] = {"trust_remote_code": recipe.trust_remote_code}
    original = run.model
    if original is None:
        dtype = dtype_of(evaluator.settings.dtype, device, read_config(recipe.model, **trust))
        original = load(recipe.model, dtype=dtype, device_map=device, **trust)
    small = load(run.staging, dtype=original.dtype, device_map=original.device, **trust)
    measured = evaluator.measure(small, original, progress)
    if evaluator.text is None:
        return measured, None
    return measured, compare_samples(small, original, evaluator.text, evaluator.tokenizer)


def calibrate_to(recipe: Recipe, kinds: Collection[Statistic] = STREAMED, announce: Announce = silent) -> Path:
    """Measure statistics of a recipe's model and keep them in its `calibration.stats` folder, which is returned.

    With inputs and gradients, what `auto` plans by, two of its plans are tried, too, if the text has blocks to spare.
    Raises `LayershareError` as `run` does.
    """
    options = recipe.calibration
    assert options.stats is not None
    folder = require_stats_folder(Path(options.stats))
    device_of(recipe.device)  # refuses an unknown one before anything is read or written
    config = read_config(recipe.model, trust_remote_code=recipe.trust_remote_code)
    spec = describe(config)
    tokenizer = read_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
    text, spare = load_with_spare(options, tokenizer, config)
    tries, length = spare is not None and {"inputs", "gradients"} <= {*kinds}, text.tokens.shape[1]
    needed = estimate_needs(
        spec, None, blocks=options.blocks, length=length, batch_size=options.batch_size, kinds=frozenset(kinds)
    )
    room = needed.stats + (needed.output if tries else needed.states)
    require_disk({folder: still_needed(room, folder)})
    make_folder(folder)
    with writing(folder, needed=room), TemporaryDirectory(prefix="scratch-", dir=folder) as temporary:
        scratch = Path(temporary)
        weights = open_weights(recipe, config, scratch)
        weights.require_sound()
        passes: dict[str, Any] = {"batch_size": options.batch_size, "scratch": scratch}
        stats = calibrate(weights, spec, text, folder, kinds=kinds, progress=announce("calibrate"), **passes)
        if tries:
            try_plans(Evidence(spec, weights, stats, text, spare, announce("try plans"), **passes), scratch)
    return folder
