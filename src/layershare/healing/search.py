"""A search for the settings that training is sensitive to: short trainings, the best held-out loss wins.

DeltaLLM reports Bayesian optimisation of its hyper-parameters without the ranges (arXiv 2501.18596); these are ours.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from layershare.errors import LayershareError
from layershare.healing.distill import StoredLogits
from layershare.healing.job import HealJob
from layershare.healing.settings import Healing
from layershare.healing.trainer import Diverged
from layershare.healing.training import train
from layershare.progress import Progress, Say, no_progress, say_nothing
from layershare.store import write_json

TRIALS = "trials.json"


def search(
    job: HealJob, teacher: PreTrainedModel | StoredLogits | None, folder: Path, progress: Progress, say: Say
) -> tuple[Healing, list[dict[str, Any]]]:
    """The settings with the best held-out loss of those tried, and every trial: `settings` and `held_out_loss`.

    The first trial is of the settings as they are; the others are chosen by a tree-structured Parzen estimator. The
    loss is `None` where it was no number. Finished trials are kept in the folder. Raises `LayershareError` if no trial
    came to an end.
    """
    import optuna

    healing = job.healing
    assert healing.search is not None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=healing.seed))
    ranges = space(healing)
    study.enqueue_trial(_values(healing, ranges))
    file = folder / TRIALS
    trials: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    steps = max(1, math.ceil(healing.search.budget * job.steps))
    best, chosen = math.inf, None
    for number in range(healing.search.trials):
        progress(number, healing.search.trials)
        # Asked for anew even if the trial is there: then the sampler goes on as if it had not been interrupted.
        trial = study.ask({key: optuna.distributions.FloatDistribution(*ends, log=log) for key, ends, log in ranges})
        settings = with_values(healing, trial.params)
        if number == len(trials):
            short = replace(settings, report_to=(), evaluate_every=steps)
            loss = _try(job.with_settings(short, steps), teacher, folder / f"trial-{number}")
            trials.append({"settings": trial.params, "held_out_loss": loss})
            if PartialState().is_main_process:
                write_json(file, trials)
        loss = trials[number]["held_out_loss"]
        study.tell(trial, loss, None if loss is not None else optuna.trial.TrialState.FAIL)
        shown = ", ".join(f"{key} {value:.3g}" for key, value in trial.params.items())
        measured = "not a number" if loss is None else f"{loss:.4f}"
        say(f"trial {number + 1} of {healing.search.trials}: held-out loss {measured} ({shown})")
        if loss is not None and loss < best:
            best, chosen = loss, settings
    progress(1, 1)
    if chosen is None:
        raise LayershareError("No trial of the search came to a loss that is a number; lower optimizer.lr.")
    return chosen, trials


def space(healing: Healing) -> list[tuple[str, tuple[float, float], bool]]:
    """The settings that are searched: full key, ends of the range, whether it is searched on a logarithmic scale."""
    lr = healing.optimizer.lr
    found = [("optimizer.lr", (lr / 10, lr * 10), True)]
    if healing.loss.kind == "both":
        found.append(("loss.alpha", (0.0, 1.0), False))
    if healing.loss.kind != "ce":
        found.append(("loss.temperature", (1.0, 4.0), True))
    if healing.replace is not None:
        found += [("replace.start", (0.0, 1.0), False), ("replace.ramp", (0.1, 1.0), False)]
    return found


def with_values(healing: Healing, values: dict[str, float]) -> Healing:
    """The settings with other values under some full keys."""
    for key, value in values.items():
        section, name = key.split(".")
        healing = replace(healing, **{section: replace(getattr(healing, section), **{name: value})})
    return healing


def _values(healing: Healing, ranges: list[tuple[str, tuple[float, float], bool]]) -> dict[str, float]:
    """The settings' own values, moved into the ranges."""
    values = {}
    for key, (low, high), _ in ranges:
        section, name = key.split(".")
        values[key] = min(max(getattr(getattr(healing, section), name), low), high)
    return values


def _try(job: HealJob, teacher: PreTrainedModel | StoredLogits | None, folder: Path) -> float | None:
    """The held-out loss after a training in a folder that is deleted; `None` if it diverges."""
    try:
        loss = train(job, teacher, folder, no_progress, say_nothing).held_out_loss
    except Diverged:
        loss = None
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    # The main process's, to the bit, or the others might go on with other settings.
    return broadcast_object_list([loss])[0]
