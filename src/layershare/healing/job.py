"""A healing that has been checked: what is known before anything is computed, and what it trains with."""

import copy
import hashlib
import json
import warnings
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from layershare.calibrate.text import Source, Text, block_length, load_text
from layershare.device import precision_of, training_device
from layershare.errors import LayershareError, how_to_install, short
from layershare.evaluate.evaluator import Evaluator, load_evaluator
from layershare.healing.arguments import require_known, require_optimizer
from layershare.healing.distill import StoredLogits
from layershare.healing.needs import HealNeeds, estimate
from layershare.healing.parameters import choose
from layershare.healing.settings import Healing
from layershare.model.describe import describe
from layershare.model.hub import load
from layershare.model.original import located
from layershare.model.source import read_config, read_tokenizer, resolve
from layershare.model.vocabulary import require_same_vocabulary
from layershare.model.weights import Weights
from layershare.progress import Progress
from layershare.report.results import results_of
from layershare.store import checksum

MOST_EPOCHS, MOST_BLOCKS = 10_000, 10**8
"""What no training needs, and what its order still fits into memory."""


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
    evaluator: Evaluator | None
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

    @cached_property
    def fingerprint(self) -> str:
        """What tells one healing's work from another's: the compressed weights, the text and the teacher."""
        teacher: Any = self.teacher
        if isinstance(teacher, PreTrainedModel):
            teacher = Weights.of(teacher).fingerprint
        elif teacher is not None and (there := Path(resolve(teacher))).is_dir():
            teacher = checksums(there)
        # Without the folder's name: a model in memory is saved to another one each time.
        config = {key: value for key, value in self.config.to_dict().items() if key != "_name_or_path"}
        identity = json.dumps([checksums(self.folder), self.text.tokens_sha256, teacher, str(config)])
        return hashlib.sha256(identity.encode()).hexdigest()

    def with_settings(self, healing: Healing, steps: int) -> "HealJob":
        """The same with other settings of loss, replacement and optimizer, in so many steps."""
        return replace(self, healing=healing, steps=steps)

    def student(self) -> Any:
        """The compressed model in float32, all frozen but what is to train, adapters attached."""
        torch.manual_seed(self.healing.seed)  # adapters are drawn at random
        return choose(load(self.folder, dtype=torch.float32, **self.trust), self.healing)

    @property
    def trust(self) -> dict[str, Any]:
        """What whoever opens a model by its name is told."""
        return {"trust_remote_code": self.healing.trust_remote_code}

    @property
    def teacher_dtype(self) -> str:
        """In which the teacher is held."""
        # Behind gates its blocks get the student's float32 states, and some families' want weights of the same dtype.
        return "float32" if self.healing.replace else self.healing.precision

    def load_teacher(self, folder: Path, progress: Progress) -> PreTrainedModel | StoredLogits | None:
        """The teacher, frozen; its logits, kept in `folder`, if they are to be stored; `None` without."""
        if not self.healing.teaches:
            return None
        assert self.teacher is not None
        k = self.healing.loss.store_teacher
        dtype = self.teacher_dtype
        if k is None:
            given = self.teacher
            model: Any = load(given, dtype=dtype, **self.trust) if isinstance(given, str) else copy.deepcopy(given)
            return model.requires_grad_(False).eval().to(getattr(torch, dtype))
        with PartialState().main_process_first():
            if isinstance(self.teacher, PreTrainedModel):
                weights = Weights.of(self.teacher)
            else:
                place: dict[str, Any] = {"device": self.device, **self.trust}
                weights = Weights.open(self.teacher, folder / "scratch", dtype=dtype, **place)
            used = self.train_tokens[: self.steps * self.healing.batch_size]
            return StoredLogits.make(weights, used, folder, k, self.micro, progress=progress)

    def needs(self, student: PreTrainedModel) -> HealNeeds:
        """What training will need."""
        teacher = 0
        if self.healing.teaches and self.healing.loss.store_teacher is None:
            each = getattr(torch, self.teacher_dtype).itemsize
            original = read_config(self.teacher, **self.trust) if isinstance(self.teacher, str) else self.teacher
            assert original is not None
            teacher = each * describe(original).parameters
        length = self.text.tokens.shape[1]
        accumulates = self.healing.batch_size > self.micro * self.processes
        return estimate(student, self.healing, self.steps, self.micro, length, teacher, accumulates)


def prepare_healing(
    healing: Healing,
    *,
    folder: Path | None = None,
    teacher: PreTrainedModel | None = None,
    text: Source | None = None,
) -> HealJob:
    """Check settings against the model, its teacher and the text; nothing is computed or written.

    The model's folder, a teacher in memory and a text may be given in place of the settings'. Raises `LayershareError`
    for everything that is wrong with them.
    """
    if healing.search is not None and find_spec("optuna") is None:
        raise LayershareError(f"The search needs optuna: {how_to_install('search')}.")
    require_known(healing)
    if folder is None:
        healing = replace(healing, model=located(healing.model))
    if healing.teacher is not None:
        healing = replace(healing, teacher=located(healing.teacher))
    folder = folder or Path(resolve(healing.model))
    if not folder.is_dir():
        raise LayershareError(f"There is no folder '{healing.model}'; heal a model that is on this machine.")
    device, trust = training_device(healing.device), healing.trust_remote_code
    healing = replace(healing, precision=precision_of(healing.precision, device))
    config = read_config(folder, trust_remote_code=trust)
    tokenizer = read_tokenizer(folder, trust_remote_code=trust)
    require_optimizer(healing, device)
    original = _original(folder, config)
    master = teacher if teacher is not None else healing.teacher or original
    if master is None and healing.teaches:
        raise LayershareError(
            f"'{healing.model}' does not say what it was made from; name the original with --teacher."
        )
    named = healing.teacher
    if named is not None and not healing.teaches and healing.evaluation is None:
        raise LayershareError(f"Nothing is asked of the teacher '{short(named)}': set --loss distill, or leave it out.")
    if master is not None and (healing.teaches or healing.evaluation is not None):
        if isinstance(master, str):
            _require_there(master, healing)
        require_same_vocabulary("teacher", master, config, tokenizer, trust_remote_code=trust)
    if (k := healing.loss.store_teacher) is not None and k > config.vocab_size:
        raise LayershareError(f"loss.store_teacher={k} is more than the {config.vocab_size} tokens that there are.")
    if healing.replace is not None or healing.loss.hidden:
        assert master is not None
        what = "train without replacement" if healing.replace is not None else "set loss.hidden to 0"
        theirs = master.config if isinstance(master, PreTrainedModel) else read_config(master, trust_remote_code=trust)
        _require_replaceable(config, theirs, what)
    options = healing.text
    length = block_length(config, options.length)
    blocks = load_text(
        options.text if text is None else text,
        tokenizer,
        split="train",
        blocks=None,
        length=length,
        seed=options.seed,
        vocabulary=config.vocab_size,
    )
    available = len(blocks.tokens) - options.held_out
    if options.tokens is not None:
        steps = -(-options.tokens // (healing.batch_size * length))
    else:
        steps = max(1, int((options.epochs or 1) * available) // healing.batch_size)
    require_blocks(
        blocks, options.held_out, healing.batch_size, steps, ("", "text.length", "text.tokens or text.epochs")
    )
    evaluator = None
    if healing.evaluation is not None:
        evaluator = load_evaluator(healing.evaluation, tokenizer, config)
        if evaluator.text is not None and evaluator.text.text_sha256 == blocks.text_sha256:
            warnings.warn("The model is measured on the very text that it is trained on.", stacklevel=2)
    # One process measures, or stores the teacher's logits, while the others wait.
    processes = PartialState(cpu=device == "cpu", timeout=timedelta(days=1)).num_processes
    micro = healing.micro_batch or -(-healing.batch_size // processes)
    if healing.batch_size % (micro * processes):
        raise LayershareError(
            f"A batch of {healing.batch_size} blocks cannot be split into micro-batches of {micro} in {processes} "
            "processes; change batch_size or micro_batch."
        )
    return HealJob(healing, folder, device, config, tokenizer, master, blocks, evaluator, steps, micro, processes)


def checksums(folder: Path) -> dict[str, str]:
    """Those of the weight files in a folder, by their names."""
    return {path.name: checksum(path) for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin")}


def require_blocks(text: Text, held_out: int, batch_size: int, steps: int, keys: tuple[str, str, str]) -> None:
    """Raise `LayershareError` for a text that is too short to train on, or that would be gone through too often.

    `keys`: before `batch_size`, that of the blocks' length, and what says how long the training is.
    """
    available, (section, length, tokens) = len(text.tokens) - held_out, keys
    if available < batch_size:
        raise LayershareError(
            f"The text '{text.source}' has {len(text.tokens)} blocks of {text.tokens.shape[1]} tokens, too few for "
            f"{held_out} held out and a batch of {batch_size}; give a longer text or a smaller {section}batch_size or "
            f"{length}."
        )
    seen = steps * batch_size
    if seen > max(MOST_EPOCHS * available, batch_size) or seen > MOST_BLOCKS:
        raise LayershareError(
            f"The training would see {seen:,} blocks of text, of which there are {available:,}; lower {tokens}."
        )


def _require_replaceable(config: PreTrainedConfig, master: PreTrainedConfig, what: str) -> None:
    """Raise `LayershareError` if the teacher's blocks have no counterparts here; `what` to do about it."""
    ours, theirs = (
        f"{getattr(each.get_text_config(), 'num_hidden_layers', '')} '{each.model_type}' blocks"
        for each in (config, master)
    )
    if ours != theirs:
        raise LayershareError(f"The model has {ours}, its teacher {theirs}, so that they cannot be compared; {what}.")
    if (getattr(config, "quantization_config", None) or {}).get("slice") is not None:
        raise LayershareError(f"A sliced model works on other hidden states than its teacher; {what}.")


def _require_there(original: str, healing: Healing) -> None:
    """Raise `LayershareError` if the teacher is no model; where the settings do not name one, with what to do."""
    try:
        read_config(original, trust_remote_code=healing.trust_remote_code)
    except LayershareError as error:
        if healing.teacher is not None:
            raise
        raise LayershareError(
            f"'{original}', which the model was made from, is not here; name the original with --teacher."
        ) from error


def _original(folder: Path, config: PreTrainedConfig) -> str | None:
    """The name of the model that a folder's was made from, where it says so. Raises as `results_of`."""
    notes = getattr(config, "quantization_config", None) or {}
    name = results_of(folder).get("model") or notes.get("compression", {}).get("model")
    return name if isinstance(name, str) else None
