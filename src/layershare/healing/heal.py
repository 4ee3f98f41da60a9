"""One healing: check, measure, train, measure, publish. Killed anywhere, the same call continues."""

import copy
import json
import shutil
import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from layershare.calibrate.stats import Progress
from layershare.calibrate.text import Source, Text, load_text
from layershare.errors import LayershareError
from layershare.evaluate.generate import compare_samples
from layershare.evaluate.trial import Trial, load_trial
from layershare.folders import WORK, is_finished, publish, require_disk, work_folder
from layershare.healing.distill import StoredLogits
from layershare.healing.needs import HealNeeds, estimate
from layershare.healing.parameters import choose, merge
from layershare.healing.replacement import ReplacementCallback, gates
from layershare.healing.settings import Healing
from layershare.healing.training import (
    HealTrainer,
    Objective,
    Ordered,
    Say,
    Watch,
    arguments,
    compiled,
    last_checkpoint,
)
from layershare.model.arch import describe
from layershare.model.hub import QUANT_METHOD, load, save
from layershare.model.source import read_config, read_tokenizer, resolve
from layershare.model.weights import Weights
from layershare.report.page import write_pages
from layershare.report.results import environment
from layershare.run import Clock, Report, block_length, device_of, silent
from layershare.store import write_atomically, write_json

HEAL = "heal.yaml"
KEPT = ("plan.json", "recipe.yaml")
"""What is copied from the compressed folder as it is."""


@dataclass(frozen=True)
class HealJob:
    """A healing that has been checked: its settings, the compressed model's folder, texts, teacher, steps.

    `teacher`: a model, the name of one, or `None` if none is needed or known. `micro`: rows at once in one process.
    """

    healing: Healing
    folder: Path
    device: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel | str | None
    text: Text
    trial: Trial | None
    steps: int
    micro: int
    processes: int

    @property
    def train_tokens(self) -> Tensor:
        """The blocks that are trained on."""
        return self.text.tokens[: -self.healing.text.held_out]

    @property
    def held_out(self) -> Tensor:
        """The blocks that are not."""
        return self.text.tokens[-self.healing.text.held_out :]

    def student(self) -> Any:
        """The compressed model in float32, all frozen but what is to train, adapters attached."""
        torch.manual_seed(self.healing.seed)  # adapters are drawn at random
        return choose(load(self.folder, dtype=torch.float32), self.healing)

    def load_teacher(self, folder: Path, device: str, progress: Progress) -> PreTrainedModel | StoredLogits | None:
        """The teacher, frozen, on a device; its logits, kept in `folder`, if they are to be stored; `None` without."""
        if not self.healing.teaches:
            return None
        assert self.teacher is not None
        k = self.healing.loss.store_teacher
        # The student's hidden states are in float32, and some families' blocks want their weights to be so, too.
        dtype = "float32" if self.healing.replace else self.healing.precision
        if k is None:
            given = self.teacher
            model: Any = load(resolve(given), dtype=dtype) if isinstance(given, str) else copy.deepcopy(given)
            return model.requires_grad_(False).eval().to(device, getattr(torch, dtype))
        with PartialState().main_process_first():
            if isinstance(self.teacher, PreTrainedModel):
                weights = Weights.of(self.teacher)
            else:
                weights = Weights.open(resolve(self.teacher), folder / "scratch", dtype=dtype, device=device)
            used = self.train_tokens[: self.steps * self.healing.batch_size]
            return StoredLogits.make(weights, used, folder, k, self.micro, progress=progress)

    def needs(self, student: PreTrainedModel) -> HealNeeds:
        """What training will need."""
        teacher = 0
        if self.healing.teaches and self.healing.loss.store_teacher is None:
            each = 2 if self.healing.precision == "bfloat16" else 4
            original = read_config(self.teacher) if isinstance(self.teacher, str) else self.teacher
            assert original is not None
            teacher = each * describe(original).parameters
        length = self.text.tokens.shape[1]
        return estimate(student, self.healing, self.steps, self.micro, length, teacher, self.config.vocab_size)


def prepare_healing(healing: Healing, *, teacher: PreTrainedModel | None = None, text: Source | None = None) -> HealJob:
    """Check settings against the model, its teacher and the text; nothing is computed or written.

    A teacher in memory and a text may be given in place of the settings'. Raises `LayershareError` for everything that
    is wrong with them.
    """
    source = resolve(healing.model)
    if not Path(source).is_dir():
        raise LayershareError(f"There is no folder '{healing.model}'; heal a model on this machine.")
    folder, config, device = Path(source), read_config(source), device_of(healing.device)
    tokenizer = read_tokenizer(source)
    master = teacher if teacher is not None else healing.teacher or _original(folder, config)
    if master is None and healing.teaches:
        raise LayershareError(
            f"'{healing.model}' does not say what it was made from; name the original with --teacher."
        )
    if master is not None and (healing.teaches or healing.evaluation is not None):
        theirs = master.config if isinstance(master, PreTrainedModel) else read_config(master)
        if theirs.vocab_size != config.vocab_size:
            raise LayershareError(
                f"The teacher has another vocabulary ({theirs.vocab_size} tokens, this model {config.vocab_size}); "
                "name the original with --teacher."
            )
    options = healing.text
    length = block_length(config, options.length)
    blocks = load_text(
        options.text if text is None else text, tokenizer, split="train", blocks=None, length=length, seed=options.seed
    )
    available = len(blocks.tokens) - options.held_out
    if available < healing.batch_size:
        raise LayershareError(
            f"The text '{blocks.source}' has {len(blocks.tokens)} blocks of {length} tokens, too few for "
            f"{options.held_out} held out and a batch of {healing.batch_size}; give a longer text or a smaller "
            "batch_size or text.length."
        )
    if options.tokens is not None:
        steps = -(-options.tokens // (healing.batch_size * length))
    else:
        steps = max(1, int((options.epochs or 1) * available) // healing.batch_size)
    trial = None
    if healing.evaluation is not None:
        trial = load_trial(healing.evaluation, tokenizer, block_length(config, healing.evaluation.length or length))
        if trial.text is not None and trial.text.text_sha256 == blocks.text_sha256:
            warnings.warn("The model is measured on the very text that it is trained on.", stacklevel=2)
    processes = PartialState(cpu=device == "cpu").num_processes
    micro = healing.micro_batch or -(-healing.batch_size // processes)
    if healing.batch_size % (micro * processes):
        raise LayershareError(
            f"A batch of {healing.batch_size} blocks cannot be split into micro-batches of {micro} in {processes} "
            "processes; change batch_size or micro_batch."
        )
    return HealJob(healing, folder, device, config, tokenizer, master, blocks, trial, steps, micro, processes)


def _original(folder: Path, config: PreTrainedConfig) -> str | None:
    """The name of the model that a folder's was made from, where it says so."""
    notes = getattr(config, "quantization_config", None) or {}
    return _results(folder).get("model") or notes.get("compression", {}).get("model")


def heal_folder(
    job: HealJob, out: str | Path, *, report: Report = silent, say: Say = lambda line: None
) -> dict[str, Any]:
    """Carry out a healing and leave a Hugging Face folder in `out`; returns its results, as in `results.json`.

    The compressed folder is not changed. The same call continues an interrupted healing, and returns at once if it is
    finished. Under `torchrun` or `accelerate launch` all processes call it. Raises `LayershareError` for bad input, and
    when the loss is no number.
    """
    out, healing = Path(out), job.healing
    if is_finished(out, healing.to_yaml(), HEAL):
        results = _results(out)
        shutil.rmtree(out / WORK, ignore_errors=True)
        date = results["healing"]["date"]
        warnings.warn(f"'{out}' holds this very healing, finished {date}: nothing was done.", stacklevel=2)
        return results
    state = PartialState()
    state.wait_for_everyone()
    student = job.student()
    needs = job.needs(student)
    say(needs.sentence())
    # Twice what is trained, its optimizer states, and the result.
    require_disk({out: 2 * (needs.gradients + needs.states) + needs.weights})
    main = state.is_main_process
    with work_folder(out, healing.to_yaml(), HEAL) if main else nullcontext(out / WORK) as work:
        state.wait_for_everyone()
        return _carry_out(job, out, work, student, needs, Clock(report if main else silent), say if main else _quiet)


def _carry_out(
    job: HealJob, out: Path, work: Path, student: Any, needs: HealNeeds, clock: Clock, say: Say
) -> dict[str, Any]:
    """The steps of a healing whose input has been checked."""
    state, healing = PartialState(), job.healing
    done: dict[str, Any] = {}
    if job.trial is not None and state.is_main_process:
        with clock.step("evaluate before") as progress:
            done["before"] = _measure(job, job.folder, progress)
    state.wait_for_everyone()
    student, log, speed = train(job, student, work / "training", clock, say)
    if not state.is_main_process:
        state.wait_for_everyone()
        return _results(out)
    staging = work / "model"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    with clock.step("write"):
        _write(job, student, staging)
    if job.trial is not None:
        with clock.step("evaluate after") as progress:
            done["after"] = _measure(job, staging, progress)
    results = _results(job.folder)
    teacher = job.teacher.name_or_path if isinstance(job.teacher, PreTrainedModel) else job.teacher
    results["healing"] = {
        "settings": asdict(healing),
        "teacher": teacher if healing.teaches else None,
        "text": {**job.text.identity, "seed": healing.text.seed, "held_out": healing.text.held_out},
        "needs": asdict(needs),
        "tokens_per_second": round(speed, 1),
        "processes": job.processes,
        "log": log,
        **({"evaluation": done} if done else {}),
        **({"previous": results["healing"]} if "healing" in results else {}),
        "seconds": clock.seconds,
        **environment(*(job.trial.packages if job.trial else ()), *(("peft",) if healing.train == "lora" else ())),
    }
    write_json(staging / "results.json", results)
    if all((staging / file).is_file() for file in KEPT):
        write_pages(staging, out.name)
    publish(staging, out)
    state.wait_for_everyone()
    return _results(out)


def _results(folder: Path) -> dict[str, Any]:
    file = folder / "results.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def train(
    job: HealJob, student: Any, folder: Path, clock: Clock, say: Say
) -> tuple[PreTrainedModel, list[dict[str, Any]], float]:
    """Train, from the last checkpoint in the folder if there is one.

    Returns the model without adapters, the log, and tokens per second. Raises `LayershareError` as `HealTrainer` does.
    """
    healing = job.healing
    options = arguments(healing, folder, job.steps, job.micro, job.processes, job.device)
    with clock.step("teacher") if healing.loss.store_teacher else nullcontext(silent("")) as progress:
        teacher = job.load_teacher(folder / "teacher", str(options.device), progress)
    data = Ordered(job.train_tokens, job.steps * healing.batch_size, healing.text.seed)
    model = student if isinstance(student, PreTrainedModel) else student.get_base_model()
    original = teacher if isinstance(teacher, PreTrainedModel) else None
    if job.device == "cpu":
        torch.set_flush_denormal(True)
    with ExitStack() as stack:
        if healing.compile:
            stack.enter_context(compiled(model, original))
        trainer = HealTrainer(student, Objective(healing.loss, model, teacher), args=options, train_dataset=data)
        if healing.replace is not None:
            assert original is not None
            found = stack.enter_context(gates(model, original, healing.replace))
            trainer.add_callback(ReplacementCallback(found, healing.seed))
        progress = stack.enter_context(clock.step("train"))
        every = healing.evaluate_every or max(1, job.steps // 10)
        watch = Watch(trainer, job.held_out, every, job.micro, progress, say)
        trainer.add_callback(watch)
        checkpoint = last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trained = merge(trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False))
    trained.config.use_cache = job.config.use_cache
    return trained.requires_grad_(True).cpu(), trainer.state.log_history, watch.speed


def _write(job: HealJob, model: PreTrainedModel, staging: Path) -> None:
    """The whole folder but results and pages, weights in the dtype of the compressed checkpoint."""
    model.to(job.config.dtype or torch.float32)  # pyright: ignore[reportArgumentType]
    if getattr(job.config, "quantization_config", {}).get("quant_method") == QUANT_METHOD:
        save(model, staging, job.tokenizer)
    else:
        model.save_pretrained(staging, max_shard_size=job.healing.max_shard_size)
        job.tokenizer.save_pretrained(staging)
    for name in KEPT:
        if (job.folder / name).is_file():
            shutil.copyfile(job.folder / name, staging / name)
    write_atomically(staging / HEAL, job.healing.to_yaml().encode())


def _measure(job: HealJob, folder: Path, progress: Any) -> dict[str, Any]:
    assert job.trial is not None
    dtype = job.trial.test.dtype
    model = load(folder, dtype=dtype, device_map=job.device)
    original = job.teacher
    if isinstance(original, str):
        original = load(resolve(original), dtype=dtype, device_map=job.device)
    measured = job.trial.measure(model, original, progress)
    if original is not None and job.trial.text is not None:
        measured["samples"] = compare_samples(model, original, job.trial.text, job.tokenizer)
    return measured


def _quiet(line: str) -> None:
    """Say nothing."""
