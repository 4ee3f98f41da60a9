"""One healing: measure, train, measure, publish. Killed anywhere, the same call continues."""

import shutil
import warnings
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedModel

from layershare.device import dtype_of
from layershare.disk import require_disk, still_needed, writing
from layershare.errors import LayershareError
from layershare.evaluate.evaluator import Measured
from layershare.evaluate.generate import compare_samples
from layershare.folders import AGAIN, HEAL, WORK, copy_records, is_finished, publish, was_compressed, work_folder
from layershare.foreign import reading
from layershare.healing.job import HealJob
from layershare.healing.needs import HealNeeds
from layershare.healing.search import search
from layershare.healing.training import train
from layershare.model.hub import QUANT_METHOD, load, store_as, write_folder
from layershare.model.original import copy_side_files
from layershare.model.source import stored_types
from layershare.progress import Announce, Clock, Progress, Say, no_progress, say_nothing, silent
from layershare.report.page import write_pages
from layershare.report.results import RESULTS, Environment, Healed, Stages, TrainingText, parsed_as, read_as, results_of
from layershare.store import make_folder, write_atomically, write_json


def heal_folder(job: HealJob, out: str | Path, *, announce: Announce = silent, say: Say = say_nothing) -> Healed:
    """Carry out a healing and leave a Hugging Face folder in `out`; returns what `results.json` tells of it.

    The compressed folder is not changed. The same call continues an interrupted healing, and returns at once if it is
    finished. Under `torchrun` or `accelerate launch` all processes call it. Raises `LayershareError` for bad input, and
    when the loss is no number.
    """
    out, healing = Path(out), job.healing
    if is_finished(out, healing.to_yaml(), HEAL):
        with reading(f"The {RESULTS} in '{out}'", AGAIN):
            healed = _healed(out)
        if healed.fingerprint != job.fingerprint:
            raise LayershareError(
                f"The folder '{out}' holds a finished healing of another model, text or teacher; name another folder."
            )
        shutil.rmtree(out / WORK, ignore_errors=True)
        warnings.warn(f"'{out}' holds this very healing, finished {healed.date}: nothing was done.", stacklevel=2)
        return healed
    state = PartialState()
    main = state.is_main_process
    if not main:
        announce, say = silent, say_nothing
    state.wait_for_everyone()
    needs = job.needs(job.student())
    say(needs.sentence())
    # What is trained and its optimizer states, in three checkpoints before the oldest one is deleted, and the result.
    room = 3 * (needs.gradients + needs.states) + needs.weights
    require_disk({out: still_needed(room, out / WORK)})
    with work_folder(out, healing.to_yaml(), HEAL, room) if main else writing(out, needed=room):
        state.wait_for_everyone()
        return _carry_out(job, out, out / WORK, needs, Clock(announce), say)


def _carry_out(job: HealJob, out: Path, work: Path, needs: HealNeeds, clock: Clock, say: Say) -> Healed:
    """The steps of a healing whose input has been checked."""
    state, healing = PartialState(), job.healing
    measured = None
    training = work / f"training-{job.fingerprint[:16]}"
    if job.evaluator is not None and state.is_main_process:
        before = training / "before.json"
        if before.is_file():
            measured = read_as(Measured, before)
        else:
            with clock.step("evaluate before") as progress:
                measured = _measure(job, job.folder, progress)
            make_folder(training)
            write_json(before, measured)
    state.wait_for_everyone()
    with clock.step("teacher") if healing.loss.store_teacher else nullcontext(no_progress) as progress:
        teacher = job.load_teacher(training / "teacher", progress)
    trials = None
    if healing.search is not None:
        with clock.step("search") as progress:
            chosen, trials = search(job, teacher, training, progress, say)
        job = job.with_settings(chosen, job.steps)
    with clock.step("train") as progress:
        trained = train(job, teacher, training, progress, say)
    if not state.is_main_process:
        state.wait_for_everyone()
        return _healed(out)
    staging = work / "model"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    with clock.step("write"):
        _write(job, trained.model, staging)
    stages = None
    if measured is not None:
        with clock.step("evaluate after") as progress:
            stages = Stages(measured, _measure(job, staging, progress, samples=True))
    results = results_of(job.folder)
    teacher = job.teacher.name_or_path if isinstance(job.teacher, PreTrainedModel) else job.teacher
    packages = (*(job.evaluator.packages if job.evaluator else ()), *(("peft",) if healing.train == "lora" else ()))
    results["healing"] = healed = Healed(
        settings=asdict(healing),
        fingerprint=job.fingerprint,
        teacher=teacher if healing.teaches else None,
        text=TrainingText(**job.text.identity, seed=healing.text.seed, held_out=healing.text.held_out),
        needs=asdict(needs),
        search={"trials": trials, "chosen": asdict(job.healing)} if trials else None,
        tokens_per_second=round(trained.speed, 1),
        processes=job.processes,
        log=trained.log,
        evaluation=stages,
        previous=results.get("healing"),
        seconds=clock.seconds,
        **vars(Environment.here(*packages)),
    )
    write_json(staging / RESULTS, results)
    if was_compressed(staging):
        write_pages(staging, out.absolute().name)
    publish(staging, out)
    state.wait_for_everyone()
    return healed


def _healed(folder: Path) -> Healed:
    """What a folder's `results.json` tells of its healing. Raises `ValueError` if it is damaged."""
    return parsed_as(Healed, results_of(folder)["healing"])


def _write(job: HealJob, model: PreTrainedModel, staging: Path) -> None:
    """The whole folder but results and pages, weights in the dtype of the compressed checkpoint."""
    store_as(model, *stored_types(str(job.folder), job.config))
    if getattr(job.config, "quantization_config", {}).get("quant_method") == QUANT_METHOD:
        write_folder(model, staging, job.tokenizer, job.healing.max_shard_size)
    else:
        model.save_pretrained(staging, max_shard_size=job.healing.max_shard_size)
        job.tokenizer.save_pretrained(staging)
    copy_side_files(job.folder, staging)
    copy_records(job.folder, staging)
    write_atomically(staging / HEAL, job.healing.to_yaml().encode())


def _measure(job: HealJob, folder: Path, progress: Progress, *, samples: bool = False) -> Measured:
    assert job.evaluator is not None
    dtype = dtype_of(job.evaluator.settings.dtype, job.device, job.config)
    model = load(folder, dtype=dtype, device_map=job.device, **job.trust)
    original = job.teacher
    if isinstance(original, str):
        original = load(original, dtype=dtype, device_map=job.device, **job.trust)
    measured = job.evaluator.measure(model, original, progress)
    if samples and original is not None and job.evaluator.text is not None:
        texts = compare_samples(model, original, job.evaluator.text, job.tokenizer)
        measured = replace(measured, samples=texts)
    return measured
