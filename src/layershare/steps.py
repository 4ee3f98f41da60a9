"""The steps of a run that choose and solve a plan, over one context; each finds again what it has finished before."""

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layershare.calibrate.stats import calibrate
from layershare.calibrate.text import Text
from layershare.device import device_of
from layershare.errors import LayershareError, NotFinite
from layershare.evaluate.evaluator import Evaluator
from layershare.job import Job, refits
from layershare.methods import name_of, plan_with
from layershare.model.hub import load
from layershare.model.weights import Weights
from layershare.plan.evidence import Evidence
from layershare.plan.layout import composed_tensors, compositions
from layershare.plan.method import Method
from layershare.plan.plan import Plan
from layershare.progress import Clock, Progress, no_progress, part, say_nothing
from layershare.recipe import Distill, Refine
from layershare.report.results import DISTILLED, OWN, REFINED, REFITTED, Distilled, Refined, RefinedBlock
from layershare.solve.apply import INTEGERS, UNITS, Factored, refit_coefficients
from layershare.solve.held_out import HeldOut
from layershare.solve.quantize import quantize_factors
from layershare.solve.refine import refine_blocks
from layershare.solve.two_streams import refit_to_original
from layershare.solve.write import write_model
from layershare.store import Store, write_atomically


@dataclass(frozen=True)
class Context:
    """What the steps of a run work with, all of it checked; `model` is the original if it is in memory.

    `work` is the folder of what is finished of an unfinished run. Texts and tokenizer are `None` where none is needed.
    """

    job: Job
    work: Path
    weights: Weights
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    calibration: Text | None
    held_out: Text | None
    training: Text | None
    evaluator: Evaluator | None
    clock: Clock

    @property
    def staging(self) -> Path:
        """Where the finished folder comes into being."""
        return self.work / "model"

    @property
    def scratch(self) -> Path | None:
        """Where hidden states are kept; `None`: in memory, as the model is."""
        return self.work / "scratch" if self.model is None else None

    def identity(self, name: str, method: Method) -> dict[str, Any]:
        """What tells the finished work of a method in this run from other work."""
        return {
            "layershare": version("layershare"),
            "model": self.weights.fingerprint,
            "method": name,
            "options": asdict(method),
            **({"text": self.calibration.identity} if self.calibration is not None else {}),
            **({"held_out": self.held_out.identity} if self.held_out is not None else {}),
            **({"training": self.training.identity} if self.training is not None else {}),
        }

    @cached_property
    def evidence(self) -> Evidence:
        """Weights, text and the statistics that the run needs, which are measured here unless they are there."""
        job, options, stats = self.job, self.job.recipe.calibration, None
        passes: Any = {"batch_size": options.batch_size, "scratch": self.scratch}
        if self.calibration is not None and job.kinds:
            with self.clock.step("calibrate") as progress:
                folder = Path(options.stats or self.work / "stats")
                stats = calibrate(
                    self.weights, job.spec, self.calibration, folder, kinds=job.kinds, progress=progress, **passes
                )
        return Evidence(job.spec, self.weights, stats, self.calibration, self.held_out, **passes)


@dataclass(frozen=True)
class Candidate:
    """A plan, the method that solves it, and its label where it is compared with others."""

    label: str
    method: Method
    plan: Plan

    def folder(self, run: Context) -> Path:
        """Where its solution is kept."""
        return run.work if self.label == OWN else run.work / "rivals" / self.label

    def factored(self, run: Context) -> Factored:
        """It, carried out as far as it is solved."""
        identity = run.identity(self.plan.method, self.method)
        return Factored(run.job.spec, self.plan.in_floats, run.weights, self.folder(run), identity)

    def solved(self, run: Context, progress: Progress = no_progress) -> Factored:
        """It, carried out. Raises `LayershareError` as `Method.solve` does."""
        factored = self.factored(run)
        factored.solve(self.method, replace(run.evidence, progress=progress))
        return factored


def own_plan(run: Context) -> Candidate:
    """The job's plan, or that of its method, which plans by evidence."""
    evidence = run.evidence  # measured now, before the clock of another step runs
    if run.job.plan is not None:
        return Candidate(OWN, run.job.method, run.job.plan)
    with run.clock.step("plan") as progress:
        return _planned(run, OWN, run.job.method, replace(evidence, progress=progress))


def _planned(run: Context, label: str, method: Method, evidence: Evidence) -> Candidate:
    """The plan of a method, kept in the work folder, so that a search is not repeated. Raises as `plan_with`."""
    name = name_of(method)
    digest = hashlib.sha256(json.dumps(run.identity(name, method), sort_keys=True).encode()).hexdigest()
    path = run.work / f"plan-{digest[:16]}.json"
    if path.is_file():
        return Candidate(label, method, Plan.read(path, run.job.spec))
    recipe = run.job.recipe
    plan = plan_with(run.job.spec, name, method, recipe.keep, recipe.of, evidence, run.job.stored)
    write_atomically(path, plan.to_json().encode())
    return Candidate(label, method, plan)


def measuring_held_out(run: Context, own: Factored) -> HeldOut | None:
    """What measures candidates on the held-out text, if there is one."""
    return None if run.held_out is None else HeldOut(Store(run.work / "held-out", own.identity), run.evidence)


def settled(
    run: Context, own: Candidate, factored: Factored, held_out: HeldOut | None
) -> tuple[Candidate, Factored, str]:
    """The candidate that is taken, its solution and the label of that, once rivals are compared and the refit is made.

    `factored` is the solution of the method's own plan. What is nearest to the original is fitted again; but bits alone
    leave nothing to fit, so a plan of ranks and bits is fitted before it is compared with them.
    """
    chosen, label, compares = own, own.label, run.job.compares
    fits_first = bool(run.job.method.offered_bits)
    if held_out is not None and compares and not fits_first:
        chosen, factored = nearest(run, own, factored, label, held_out)
        label = chosen.label
    if refits(chosen.plan, chosen.method, run.job.recipe.refit):
        factored, fitted = refitted(run, chosen, factored, held_out)
        label = REFITTED if fitted else label
    if held_out is not None and compares and fits_first:
        chosen, factored = nearest(run, own, factored, label, held_out)
        label = label if chosen is own else chosen.label
    return chosen, factored, label


def nearest(
    run: Context, own: Candidate, factored: Factored, label: str, held_out: HeldOut
) -> tuple[Candidate, Factored]:
    """Of the method's own plan and its rivals' the one whose solution is nearest to the original on held-out text.

    That is the one of least KL divergence; `factored` is the solution of its own, which has that label. Those that are
    not taken are deleted.
    """
    rivals = own.method.rivals()
    with run.clock.step("compare") as progress:
        parts = iter([part(progress, i, 1 + 3 * len(rivals)) for i in range(1 + 3 * len(rivals))])
        best, least = own, divergence(run, own, lambda: factored, label, held_out, next(parts))
        for name, method in rivals.items():
            planning, solving, measuring = islice(parts, 3)
            try:
                rival = _planned(run, name, method, replace(run.evidence, progress=planning))
            except LayershareError:  # it has no plan of this size
                continue
            if rival.plan.edits == own.plan.edits:
                continue
            try:
                kl = divergence(run, rival, partial(rival.solved, run, solving), name, held_out, measuring)
            except NotFinite:
                continue
            loser = best if kl < least else rival
            if kl < least:
                best, least = rival, kl
            shutil.rmtree(loser.folder(run) / UNITS, ignore_errors=True)
    return best, factored if best is own else best.solved(run)


def divergence(
    run: Context,
    candidate: Candidate,
    made: Callable[[], Factored],
    label: str,
    held_out: HeldOut,
    progress: Progress = no_progress,
) -> float:
    """How far from the original a solution of a candidate is, which `made` gives and which has this label.

    Where the method plans bits, it is measured as it would be stored, in integers.
    """
    if not candidate.method.offered_bits:
        return held_out.divergence(label, made, progress)
    rounding, measuring = (part(progress, i, 2) for i in range(2))
    return held_out.divergence(label, lambda: as_integers(run, candidate, made(), label, rounding), measuring)


def refitted(run: Context, chosen: Candidate, factored: Factored, held_out: HeldOut | None) -> tuple[Factored, bool]:
    """A candidate, `factored` its solution, with its coefficients fitted again, and whether they are.

    They are not where that takes it away from the original on the held-out text, unless the recipe insists, or the
    method is one whose paper fits them blindly.
    """
    with run.clock.step("refit") as progress:
        fitted = factored.branch()
        if held_out is None or run.job.recipe.refit is True or not run.job.method.follows_original:
            _fit_again(run, chosen.method, fitted, progress)
            return fitted, True
        before = divergence(run, chosen, lambda: factored, chosen.label, held_out)
        if held_out.found.get(REFITTED, -math.inf) >= before:
            return factored, False
        _fit_again(run, chosen.method, fitted, part(progress, 0, 2))
        after = divergence(run, chosen, lambda: fitted, REFITTED, held_out, part(progress, 1, 2))
        return (fitted, True) if after < before else (factored, False)


def refined(
    run: Context, options: Refine, chosen: Candidate, factored: Factored, label: str, fitted: bool, held_out: HeldOut
) -> tuple[Factored, Refined]:
    """A solution, `label` its own on the held-out text, with its blocks refined, and what became of them.

    It is left as it was where that takes it away from the original on the held-out text. `fitted`: whether its
    coefficients are fitted again.
    """
    recipe = run.job.recipe
    with run.clock.step("refine") as progress:
        before = divergence(run, chosen, lambda: factored, label, held_out)
        trained, seed = factored.branch(), recipe.calibration.seed
        settings = {**asdict(options), "seed": seed, "rows": recipe.calibration.batch_size, "refit": fitted}
        store = Store(run.work / "refine", {**factored.identity, "refine": settings})
        blocks = refine_blocks(trained, store, replace(run.evidence, progress=progress), options, seed)
        after = divergence(run, chosen, lambda: trained, REFINED, held_out)
    kept = after < before
    noted = {layer: RefinedBlock(**facts) for layer, facts in blocks.items()}
    return trained if kept else factored, Refined(options, kept, noted)


def distilled(
    run: Context, options: Distill, chosen: Candidate, factored: Factored, label: str, held_out: HeldOut
) -> tuple[Factored, Distilled]:
    """A solution, `label` its own on the held-out text, with all its factors distilled, and what became of them.

    It is left as it was where that takes it away from the original on the held-out text, or diverges.
    """
    assert run.training is not None
    with run.clock.step("distill") as progress:
        before = divergence(run, chosen, lambda: factored, label, held_out)
        trained = factored.branch()
        settings = {**asdict(options), "label": label, "text": run.training.identity}
        store = Store(run.work / DISTILLED, {**factored.identity, "distill": settings})
        if DISTILLED not in store:
            store.write(DISTILLED, *_distil(run, factored, run.training, held_out, progress))
            for done in run.work.glob("training-*"):
                shutil.rmtree(done)
        trained.take(store, DISTILLED)
        after = divergence(run, chosen, lambda: trained, DISTILLED, held_out)
    kept, facts = after < before, store.facts(DISTILLED)
    tokens = facts["steps"] * options.batch_size * run.training.tokens.shape[1]
    return trained if kept else factored, Distilled(options, kept, tokens, **facts)


def _distil(
    run: Context, factored: Factored, text: Text, held_out: HeldOut, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The factors of a solution, distilled, by full names, with steps, rate and best step; none where that diverged."""
    # The Trainer takes seconds to import.
    from layershare.healing.trainer import Diverged
    from layershare.healing.training import best, train
    from layershare.healing.within import distillation

    job, plan = run.job, factored.plan
    composed = compositions(job.spec, plan.edits)
    what = "deltas" if all(each.whole for each in composed) else "factors"
    removed = 1 - plan.after.targets.parameters / plan.before.targets.parameters
    assert run.tokenizer is not None
    with in_floats(run, factored) as folder:
        place = text, len(held_out.text.tokens), run.tokenizer, run.model
        healing = distillation(job.recipe, folder, what, removed, *place)
        work = run.work / f"training-{healing.fingerprint[:16]}"
        facts = {"steps": healing.steps, "lr": healing.healing.optimizer.lr, "best": 0}
        try:
            found = train(healing, healing.load_teacher(folder, no_progress), work, progress, say_nothing)
        except Diverged:
            warnings.warn("Distilling diverged and is left out; set a smaller distill.lr.", stacklevel=3)
            return {}, facts
    state = found.model.state_dict()
    made = {name: dtype for each in composed for name, (_, dtype) in composed_tensors(job.spec, each).items()}
    return {name: state[name].to(dtype) for name, dtype in made.items()}, {**facts, "best": best(found.log)["step"]}


@contextmanager
def in_floats(run: Context, factored: Factored) -> Iterator[Path]:
    """A folder of a solution as it is now, to be loaded, for the duration."""
    folder = run.work / "floats"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_model(factored, run.job.recipe, None, folder)
    yield folder
    shutil.rmtree(folder)


def as_integers(run: Context, chosen: Candidate, factored: Factored, label: str, progress: Progress) -> Factored:
    """A solution in floats, `label` its own, with its matrices stored as the candidate's plan says.

    They are rounded by GPTQ on the calibration text.
    """
    store = Store(run.work / INTEGERS / label, {**factored.identity, "of": label, "stored": asdict(chosen.plan)})
    if INTEGERS not in store:
        store.write(INTEGERS, _rounded(run, chosen.plan, factored, progress))
    done = factored.branch()
    done.store_as(chosen.plan, store)
    return done


def _rounded(run: Context, plan: Plan, factored: Factored, progress: Progress) -> dict[str, Tensor]:
    """The tensors of a solution in floats that its plan stores as integers, as these, by full names."""
    job, recipe = run.job, run.job.recipe
    assert run.calibration is not None
    composed = [each for each in compositions(job.spec, plan.edits) if any(x.storage for x in each.factors)]
    stored = {each.names: each for each in composed}
    place: dict[str, Any] = {"device_map": device_of(recipe.device), "trust_remote_code": recipe.trust_remote_code}
    with in_floats(run, factored) as folder:
        model = load(folder, dtype=torch.float32, **place)  # half precision multiplies slowly on many CPUs
        quantize_factors(
            model,
            compositions(job.spec, factored.plan.edits),
            lambda each: stored.get(each.names),
            job.spec.tensors[job.spec.weight_name(job.spec.linears[0])][1],
            tokens=run.calibration.tokens,
            batch_size=recipe.calibration.batch_size,
            progress=progress,
            scratch=run.scratch,
        )
    tensors, names = model.state_dict(), [name for each in composed for name in composed_tensors(job.spec, each)]
    return {name: tensors[name] for name in names}


def _fit_again(run: Context, method: Method, factored: Factored, progress: Progress) -> None:
    evidence = replace(run.evidence, progress=progress)
    if method.follows_original:
        refit_to_original(factored, evidence, method.outer_root)
    else:
        refit_coefficients(factored, evidence)
