"""One run: calibrate, plan, solve, refit, refine, write, measure, publish. Killed anywhere, the same call continues."""

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from layershare.calibrate.stats import STREAMED, Kind, Progress, Stats, calibrate
from layershare.calibrate.text import Source, Text, block_length, load_text
from layershare.device import device_of, dtype_of
from layershare.disk import require_disk, writing
from layershare.errors import LayershareError
from layershare.evaluate.generate import compare_samples
from layershare.evaluate.trial import Trial, load_trial
from layershare.folders import AGAIN, WORK, is_finished, publish, require_folder, require_stats_folder, work_folder
from layershare.foreign import read_mapping, reading
from layershare.formulas.linalg import REFIT_RIDGE, RIDGE
from layershare.methods import make_method, plan_with
from layershare.model.arch import Spec, describe
from layershare.model.checked import main_dtype, stored_tensors
from layershare.model.checkpoint import Tensors
from layershare.model.hub import load
from layershare.model.original import files_of, known_of, located, source_of
from layershare.model.source import read_config, read_tokenizer, require_same_model, resolve, tokenizer_of, values_of
from layershare.model.weights import Weights
from layershare.plan.budget import allowed, parse_keep
from layershare.plan.edits import Share, sharing, sliced_width
from layershare.plan.evidence import Evidence
from layershare.plan.method import Method
from layershare.plan.needs import Needs, estimate_needs
from layershare.plan.plan import Plan
from layershare.plan.work import Speed, measure_speed
from layershare.recipe import Calibration, Recipe
from layershare.report.page import write_pages
from layershare.report.results import environment, shapes
from layershare.solve.apply import Factored, refit_coefficients
from layershare.solve.refine import refine_blocks, require_refinable
from layershare.solve.write import write_model
from layershare.store import Store, make_folder, write_atomically, write_json

Report = Callable[[str], Progress]
"""Announces a step and gives the function that takes its progress."""


def silent(step: str) -> Progress:
    """Report nothing."""
    return lambda done, total: None


@dataclass(frozen=True)
class Job:
    """A recipe checked against its model: everything that can be known before a weight is read.

    `spec` has the types in which the result is stored, `computed` those in which the model is run. `plan` is `None`
    for a method that plans by what it measures.
    """

    recipe: Recipe
    spec: Spec
    computed: Tensors
    method: Method
    name: str
    plan: Plan | None
    length: int

    @property
    def refits(self) -> bool:
        """Whether coefficients will be fitted again to what the compressed layers put out."""
        if self.plan is None:
            return self.recipe.refit is True
        return refits(self.plan, self.method, self.recipe.refit)

    @property
    def kinds(self) -> frozenset[Kind]:
        """The statistics that the run needs: to plan by, or to solve groups with."""
        solves = self.plan is None or bool(sharing(self.plan.edits))
        return self.method.uses if solves else frozenset()

    @property
    def calibrated(self) -> bool:
        """Whether the run needs a text."""
        if self.recipe.refine is not None:
            return True
        if self.plan is None:
            return bool(self.kinds) or self.method.searches or self.refits
        return bool(self.kinds) or self.refits or sliced_width(self.plan.edits) is not None

    @property
    def needs(self) -> Needs:
        """What the run will need of the machine."""
        options = self.recipe.calibration
        return estimate_needs(
            replace(self.spec, tensors=self.computed),
            self.plan,
            blocks=options.blocks,
            length=self.length,
            batch_size=options.batch_size,
            kinds=self.kinds,
            refits=self.refits,
            epochs=0 if self.recipe.refine is None else self.recipe.refine.epochs,
            searches=self.plan is None and self.method.searches,
            runs=self.method.runs(self.spec) if self.plan is None else 0,
        )


def speed_for(job: Job) -> Speed:
    """The speed of the job's device at products of its model's size, measured."""
    linear = max(job.spec.linears, key=lambda linear: linear.parameters)
    _, dtype = job.computed[job.spec.weight_name(linear)]
    return measure_speed(device_of(job.recipe.device), dtype, min(linear.d_in, linear.d_out))


def refits(plan: Plan, method: Method, wanted: Literal["auto"] | bool) -> bool:
    """Whether the coefficients of a plan's shares are fitted again; `auto`: as the method says."""
    kept = plan.after.targets.parameters / plan.before.targets.parameters
    chosen = method.refits(kept) if wanted == "auto" else wanted
    return chosen and any(isinstance(edit, Share) for edit in plan.edits)


def prepare(recipe: Recipe, model: PreTrainedModel | PreTrainedConfig | Weights | None = None) -> Job:
    """Check a recipe and, where the method can, plan it, without reading a weight.

    The model is read by name if none is given: its config, and which types its weights have if they are here. A plan
    file is carried out with the method and the options that it names. Raises `LayershareError` for everything that is
    wrong with the recipe.
    """
    method = make_method(recipe.method, recipe.options)
    source, checkpoint = _described(recipe, model)
    config = source.config if isinstance(source, PreTrainedModel) else source
    dtype = dtype_of(recipe.dtype, device_of(recipe.device), config)
    spec = describe(source, None if dtype == "auto" else getattr(torch, dtype))
    if checkpoint:
        require_same_model(recipe.model, spec, checkpoint)
    computed = spec.tensors
    if recipe.store_dtype != "auto":
        spec = spec.stored_as({}, getattr(torch, recipe.store_dtype))
    elif checkpoint:
        spec = spec.stored_as({name: each.dtype for name, each in checkpoint.items()}, main_dtype(checkpoint))
    elif isinstance(source, PreTrainedConfig) and isinstance(source.dtype, torch.dtype):
        spec = spec.stored_as({}, source.dtype)
    name, plan = recipe.method, None
    if recipe.plan is not None:
        if recipe.options:
            raise LayershareError("A plan is carried out with the options that it names; give no others beside it.")
        plan = Plan.read(recipe.plan, spec)
        if not plan.edits:
            raise LayershareError(f"The plan '{recipe.plan}' has no edits: there is nothing to carry out.")
        name, method = plan.method, make_method(plan.method, plan.options)
    elif not method.adaptive:
        plan = plan_with(spec, name, method, recipe.keep, recipe.of)
    else:
        method.require(spec, allowed(spec, parse_keep(recipe.keep), recipe.of))
    if plan is not None:
        method.units(spec, plan.edits)
        if recipe.refit is True and not any(isinstance(edit, Share) for edit in plan.edits):
            raise LayershareError("The plan has no low-rank factors that could be fitted again; leave refit out.")
        if recipe.refine is not None:
            require_refinable(plan.edits)
    return Job(recipe, spec, computed, method, name, plan, block_length(config, recipe.calibration.length))


def _described(
    recipe: Recipe, model: PreTrainedModel | PreTrainedConfig | Weights | None
) -> tuple[PreTrainedModel | PreTrainedConfig, Mapping[str, Tensor] | None]:
    """The model or config that a recipe is about, and what its checkpoint stores, as far as that is here."""
    if isinstance(model, Weights):
        return model.model, model.checkpoint
    if model is not None:
        return model, None
    config = read_config(recipe.model, trust_remote_code=recipe.trust_remote_code)
    source = resolve(recipe.model)
    return config, stored_tensors(source, values_of(source), fetch=False)


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: Source | None = None,
    report: Report = silent,
    announce: Callable[[Job], None] = lambda job: None,
    pages: bool = True,
) -> dict[str, Any]:
    """Carry out a recipe and leave a Hugging Face folder in `out`; returns its results, as in `results.json`.

    A model in memory may be given in place of the recipe's, as may a tokenizer and a calibration text. The model is not
    changed. `announce` is given the job, with its plan, before anything of it is done. `pages`: with a model card and a
    page to read. The same call continues an interrupted run, and returns at once if the run is finished. Raises
    `LayershareError` for bad input, before anything is written.
    """
    out = Path(out)
    if model is None:
        recipe = replace(recipe, model=located(recipe.model))
    if is_finished(out, recipe.to_yaml()):
        with reading(f"The results.json in '{out}'", AGAIN):
            results = read_mapping(out / "results.json")
            date, fingerprint = results["date"], results["model_fingerprint"]
        if model is not None and Weights.of(model).fingerprint != fingerprint:
            raise LayershareError(f"The folder '{out}' holds a finished run of another model; name another folder.")
        if recipe.plan is not None and Plan.from_file(recipe.plan).edits != Plan.from_file(out / "plan.json").edits:
            raise LayershareError(
                f"'{recipe.plan}' has changed since the finished run in '{out}'; delete that or name another folder."
            )
        shutil.rmtree(out / WORK, ignore_errors=True)
        warnings.warn(f"'{out}' holds this very run, finished {date}: nothing was done.", stacklevel=2)
        return results
    device = device_of(recipe.device)
    job = prepare(recipe, model)
    needs_text = job.calibrated or recipe.evaluation is not None
    if tokenizer is None and (needs_text or model is None):
        tokenizer = (
            read_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
            if model is None
            else tokenizer_of(model)
        )
    source = read_config(recipe.model, trust_remote_code=recipe.trust_remote_code) if model is None else model.config
    calibration = test = None
    if job.calibrated:
        assert tokenizer is not None
        calibration = load_calibration(recipe.calibration, tokenizer, source, text)
        if job.plan is None:
            job.method.require_blocks(len(calibration.tokens))
    if recipe.evaluation is not None:
        assert tokenizer is not None
        test = load_trial(recipe.evaluation, tokenizer, source)
        if calibration is not None and test.text is not None and calibration.text_sha256 == test.text.text_sha256:
            warnings.warn("The model is measured on the very text that it is compressed for.", stacklevel=2)
    stats = out if recipe.calibration.stats is None else require_stats_folder(Path(recipe.calibration.stats))
    require_disk({out: job.needs.output, stats: job.needs.stats + (job.needs.output if stats == out else 0)})

    with work_folder(out, recipe.to_yaml(), needed=job.needs.output) as work:
        if model is None:
            scratch = work / "scratch"
            shutil.rmtree(scratch, ignore_errors=True)
            weights = _open(recipe, scratch, device)
            job = prepare(recipe, weights)  # with the dtypes that the weights really have
        else:
            weights = Weights.of(model)
        weights.require_sound()
        announce(job)
        return _carry_out(job, out, work, weights, model, tokenizer, calibration, test, Clock(report), pages)


def _carry_out(
    job: Job,
    out: Path,
    work: Path,
    weights: Weights,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Text | None,
    test: Trial | None,
    clock: "Clock",
    pages: bool,
) -> dict[str, Any]:
    """The steps of a run whose input has been checked; `model` is the original if it is in memory."""
    recipe = job.recipe
    staging = work / "model"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    stats = None
    identity = {
        "layershare": version("layershare"),
        "model": weights.fingerprint,
        "method": job.name,
        "options": asdict(job.method),
    }
    scratch = work / "scratch" if model is None else None
    if calibration is not None:
        identity["text"] = calibration.identity
        if job.kinds:
            with clock.step("calibrate") as progress:
                folder, size = Path(recipe.calibration.stats or work / "stats"), recipe.calibration.batch_size
                options: dict[str, Any] = {"batch_size": size, "scratch": scratch, "progress": progress}
                stats = calibrate(weights, job.spec, calibration, folder, kinds=job.kinds, **options)
    evidence = Evidence(
        job.spec, weights, stats, calibration, batch_size=recipe.calibration.batch_size, scratch=scratch
    )
    plan = job.plan
    if plan is None:
        with clock.step("plan") as progress:
            plan = _plan_once(job, replace(evidence, progress=progress), work, identity)
    factored = Factored(job.spec, plan, weights, work, identity)
    with clock.step("solve") as progress:
        factored.solve(job.method, replace(evidence, progress=progress))
    refitted = refits(plan, job.method, recipe.refit)
    if refitted:
        with clock.step("refit") as progress:
            refit_coefficients(factored, replace(evidence, progress=progress))
    refined = None
    if recipe.refine is not None:
        with clock.step("refine") as progress:
            seed = recipe.calibration.seed
            settings = {**asdict(recipe.refine), "seed": seed, "rows": recipe.calibration.batch_size, "refit": refitted}
            store = Store(work / "refine", {**identity, "edits": asdict(plan)["edits"], "refine": settings})
            refined = refine_blocks(factored, store, replace(evidence, progress=progress), recipe.refine, seed)
    source = recipe.model if model is None else source_of(model)
    beside = None if source is None else files_of(source)
    with clock.step("write"):
        write_model(factored, recipe, tokenizer, staging, beside)
    results = {
        "model": recipe.model,
        "original": {} if source is None else known_of(source, beside),
        "model_fingerprint": weights.fingerprint,
        "method": plan.method,
        "options": asdict(job.method),
        "keep": plan.keep,
        "of": plan.of,
        "before": asdict(plan.before),
        "after": asdict(plan.after),
        "calibration": calibration and {**calibration.identity, "seed": recipe.calibration.seed},
        "ridge": RIDGE,
        "refit": refitted,
        "refit_ridge": REFIT_RIDGE,
        "refine": refined,
        "groups": factored.facts(),
        "shapes": shapes(job.spec),
    }
    if test is not None:
        with clock.step("evaluate") as progress:
            results |= _measure(recipe, staging, test, model, progress)
    results |= {"seconds": clock.seconds, **environment(*(test.packages if test else ()))}
    write_json(staging / "results.json", results)
    if pages:
        write_pages(staging, out.name)
    publish(staging, out)
    return results


def _plan_once(job: Job, evidence: Evidence, work: Path, identity: dict[str, Any]) -> Plan:
    """The plan of a method that plans by evidence, kept in the work folder, so that a search is not repeated."""
    recipe = job.recipe
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = work / f"plan-{digest[:16]}.json"
    if path.is_file():
        return Plan.read(path, job.spec)
    plan = plan_with(job.spec, job.name, job.method, recipe.keep, recipe.of, evidence)
    write_atomically(path, plan.to_json().encode())
    return plan


def plan_only(recipe: Recipe, folder: Path | None, report: Report = silent) -> Job:
    """Plan a recipe by what its method needs: config, weights, or statistics that `calibrate_to` left in a folder.

    Raises `LayershareError` as `prepare`, and if the method needs statistics that are not there, or a text.
    """
    job = prepare(recipe)
    if job.plan is not None:
        return job
    if job.method.searches:
        raise LayershareError(
            f"'{job.name}' runs the model on a text while it plans: `layershare compress` shows its plan at the end."
        )
    if job.method.uses and folder is None:
        raise LayershareError(
            f"'{job.name}' plans by what it measures: give statistics from `layershare calibrate` with --stats."
        )
    if folder is not None:
        require_folder(folder)
    with TemporaryDirectory(prefix="layershare-") as scratch:
        weights = _open(recipe, Path(scratch))
        stats = Stats.find(folder, weights.fingerprint) if folder is not None and job.method.uses else None
        evidence = Evidence(job.spec, weights, stats, progress=report("plan"))
        return replace(job, plan=plan_with(job.spec, job.name, job.method, recipe.keep, recipe.of, evidence))


def calibrate_to(recipe: Recipe, kinds: Collection[Kind] = STREAMED, report: Report = silent) -> Path:
    """Measure statistics of a recipe's model and keep them in its `calibration.stats` folder, which is returned.

    Raises `LayershareError` as `run` does.
    """
    options = recipe.calibration
    assert options.stats is not None
    folder = require_stats_folder(Path(options.stats))
    device = device_of(recipe.device)
    config = read_config(recipe.model, trust_remote_code=recipe.trust_remote_code)
    spec = describe(config)
    text = load_calibration(options, read_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code), config)
    length = text.tokens.shape[1]
    needed = estimate_needs(
        spec, None, blocks=options.blocks, length=length, batch_size=options.batch_size, kinds=frozenset(kinds)
    )
    room = needed.stats + needed.states
    require_disk({folder: room})
    make_folder(folder)
    with writing(folder, needed=room), TemporaryDirectory(prefix="scratch-", dir=folder) as temporary:
        scratch = Path(temporary)
        weights = _open(recipe, scratch, device)
        weights.require_sound()
        progress = report("calibrate")
        passes: dict[str, Any] = {"batch_size": options.batch_size, "scratch": scratch}
        calibrate(weights, spec, text, folder, kinds=kinds, progress=progress, **passes)
    return folder


def _open(recipe: Recipe, scratch: Path, device: str = "cpu") -> Weights:
    """The weights of a recipe's model, left on disk."""
    trust: dict[str, Any] = {"trust_remote_code": recipe.trust_remote_code}
    dtype = dtype_of(recipe.dtype, device, read_config(recipe.model, **trust))
    return Weights.open(recipe.model, scratch, dtype=dtype, device=device, **trust)


def load_calibration(
    options: Calibration, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, text: Source | None = None
) -> Text:
    """The calibration text, or `text` in its place, for a model of that config. Raises as `load_text`."""
    return load_text(
        options.text if text is None else text,
        tokenizer,
        split="train",
        blocks=options.blocks,
        length=block_length(config, options.length),
        seed=options.seed,
        vocabulary=config.get_text_config().vocab_size,
    )


def _measure(
    recipe: Recipe, staging: Path, test: Trial, model: PreTrainedModel | None, progress: Progress
) -> dict[str, Any]:
    device = device_of(recipe.device)
    trust: dict[str, Any] = {"trust_remote_code": recipe.trust_remote_code}
    if model is None:
        dtype = dtype_of(test.test.dtype, device, read_config(recipe.model, **trust))
        model = load(recipe.model, dtype=dtype, device_map=device, **trust)
    original = model
    small = load(staging, dtype=original.dtype, device_map=original.device, **trust)
    results: dict[str, Any] = {"evaluation": test.measure(small, original, progress)}
    if test.text is not None:
        results["samples"] = compare_samples(small, original, test.text, test.tokenizer)
    return results


class Clock:
    """Announces steps and keeps their wall time in seconds."""

    def __init__(self, report: Report) -> None:
        self.seconds: dict[str, float] = {}
        self._report = report

    @contextmanager
    def step(self, name: str) -> Iterator[Progress]:
        """Announce and time a step; gives the function that takes its progress."""
        start = time.perf_counter()
        yield self._report(name)
        self.seconds[name] = round(time.perf_counter() - start, 3)
