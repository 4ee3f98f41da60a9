"""Zero-shot tasks through lm-eval (the extra `eval`): its stock tasks, prompts and metrics, on a model in memory.

The rows come from the hub, or from a folder with one `TASK.jsonl` per task, rows in the hub's schema: then a YAML
that includes the stock one and changes nothing but where the rows are.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layershare.bars import alone
from layershare.calibrate.files import json_lines, text_of
from layershare.calibrate.text import require_known
from layershare.connection import asking_hub
from layershare.errors import LayershareError, how_to_install, unknown
from layershare.foreign import reading, reason, require_file
from layershare.model.modes import evaluating
from layershare.progress import Progress, no_progress

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

PAPERS = {
    "openbookqa": "openbookqa",
    "winogrande": "winogrande",
    "hellaswag": "hellaswag",
    "piqa": "piqa",
    "mathqa": "mathqa",
    "arc_easy": "arc",
    "arc_challenge": "arc",
}
"""The papers' seven tasks, each with its folder in lm-eval: to know all of lm-eval's tasks takes many seconds."""

ALL_SEVEN = "papers"
"""The name that stands for the papers' seven tasks."""

_KEYS = re.compile(r"""^["']?(task|group|tag)["']?[ \t]*:(.*(?:\n[ \t]*-.*)*)""", re.MULTILINE)
_COMMENT = re.compile(r"(?:^|\s)#.*", re.MULTILINE)
_NAMES = re.compile(r"""[^\s"',\[\]]+""")
_BOOTSTRAPS = 1000
_SEED = 1234  # lm-eval's own, for the choice of examples where a task wants some


@dataclass(frozen=True)
class Score:
    """One metric. `near_chance`: within two standard errors of guessing, so that it says nothing about the model."""

    value: float
    stderr: float | None
    near_chance: bool | None


@dataclass(frozen=True)
class TaskResult:
    """What a task measured on `rows` rows. `chance` is what guessing would score; only where there are choices.

    `shots`: examples in the prompt. `version`: of the task, by lm-eval. `sha256`: of the rows; `source`: their file
    or hub data set. The last five are `None` for a group of tasks.
    """

    rows: int
    scores: dict[str, Score]
    chance: float | None = None
    shots: int | None = None
    version: str | None = None
    source: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Tasks:
    """Tasks with their rows, ready to be run on models; the first `limit` rows of each, or all."""

    loaded: dict[str, Any]
    files: dict[str, str]
    limit: int | None

    def rows(self, task: "ConfigurableTask") -> list[dict[str, Any]]:
        """The rows that are measured."""
        return [row for _, row in task.doc_iterator(limit=self.limit)]

    def require_within(self, vocabulary: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `LayershareError` if a prompt or answer has a token that a model of so many tokens does not know."""
        for loaded in self.loaded.values():
            for task in loaded["tasks"].values():
                texts = [text for row in self.rows(task) for text in _texts(task, row)]
                for start in range(0, len(texts), 1024):
                    ids = tokenizer(texts[start : start + 1024], verbose=False)["input_ids"]
                    require_known(max(chain.from_iterable(ids), default=0), vocabulary)


def load_tasks(names: Sequence[str], data: str | Path | None = None, limit: int | None = None) -> Tasks:
    """Find tasks (`papers` stands for seven) and their rows, on the hub or as `TASK.jsonl` in the folder `data`.

    Raises `LayershareError` if lm-eval is not installed, a task unknown, a file missing, or rows are not the task's.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise LayershareError(f"Tasks need lm-eval: {how_to_install('eval')}.") from error
    given = dict.fromkeys(name.strip() for name in names)
    names = list(dict.fromkeys(each for name in given for each in (PAPERS if name == ALL_SEVEN else (name,))))
    with alone():
        stock = _stock_tasks(names)
        if data is None:
            with asking_hub():
                return Tasks({name: _load(stock, name, None, limit) for name in names}, {}, limit)
        with TemporaryDirectory(prefix="layershare-") as folder:
            files = {name: _include_with_rows(stock, name, Path(data), Path(folder)) for name in names}
            local = type(stock)(include_path=folder, include_defaults=False)
            return Tasks({name: _load(local, name, files[name], limit) for name in names}, files, limit)


def run_tasks(
    tasks: Tasks,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 1,
    progress: Progress = no_progress,
) -> dict[str, TaskResult]:
    """Measure a model on tasks, by name of task, and of group where one was asked for."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    results: dict[str, TaskResult] = {}
    with evaluating(model), alone():
        # lm-eval gives a tokenizer without a padding token one.
        reader = copy.deepcopy(tokenizer)
        lm = HFLM(pretrained=model, tokenizer=reader, batch_size=batch_size)  # pyright: ignore[reportCallIssue]
        for request in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, request, partial(getattr(lm, request), disable_tqdm=True))
        for done, loaded in enumerate(tasks.loaded.values()):
            progress(done, len(tasks.loaded))
            measured: Any = evaluate(lm, loaded, limit=tasks.limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False)
            for name, values in measured["results"].items():
                results[name] = _result(tasks, name, loaded["tasks"].get(name), values)
    progress(len(tasks.loaded), len(tasks.loaded))
    return results


def _stock_tasks(names: Sequence[str]) -> "TaskManager":
    """lm-eval's index of the folders that the tasks are in: all of it takes more than a minute.

    Raises `LayershareError` for a task that lm-eval does not have.
    """
    import lm_eval

    root = Path(lm_eval.__file__).parent / "tasks"
    known: Mapping[str, str | None] = PAPERS
    if not set(names) <= set(PAPERS):
        known = task_names(root)
        for name in names:
            if name not in known:
                near = get_close_matches(name, [*known, ALL_SEVEN], n=1, cutoff=0.5)
                raise unknown("task", name, near or [*PAPERS, ALL_SEVEN])
    from lm_eval.tasks import TaskManager

    folders = {known[name] for name in names}
    if None in folders:
        return TaskManager()
    return TaskManager(include_path=sorted(str(root / folder) for folder in folders if folder), include_defaults=False)


def task_names(root: Path) -> dict[str, str | None]:
    """The names in lm-eval's files: of tasks, with their folders, and of groups and tags, which have none.

    The files are not read as YAML, which takes a minute; some of them, which others include, have no suffix.
    """
    known: dict[str, str | None] = {}
    for here, _, files in os.walk(root):
        folder = Path(here).relative_to(root).parts[:1]
        for file in files:
            if not (file.endswith("yaml") or "." not in file):
                continue
            text = Path(here, file).read_text(encoding="utf-8", errors="replace")
            for key, value in _KEYS.findall(text):
                names = _NAMES.findall(_COMMENT.sub("", value))
                if key != "task":
                    known |= dict.fromkeys(names)
                elif len(names) == 1 and folder:  # not the members of a group
                    known[names[0]] = folder[0] if known.get(names[0], folder[0]) == folder[0] else None
    return known


def _include_with_rows(stock: "TaskManager", name: str, data: Path, folder: Path) -> str:
    """Write the YAML that takes the rows of a stock task from `data`; returns the name of their file."""
    entry, rows = stock.task_index.get(name), data / f"{name}.jsonl"
    if entry is None or entry.kind.name != "TASK" or entry.yaml_path is None:
        raise LayershareError(f"'{name}' stands for several tasks; name those that '{data}' has rows for.")
    with reading(f"The folder '{data}'", "name another one"):
        there = rows.is_file()
    if not there:
        raise LayershareError(f"There is no file '{rows}' with the rows of the task '{name}'.")
    copy_of = folder / f"{name}.jsonl"
    copy_of.write_text("".join(f"{json.dumps(row)}\n" for row in _rows(rows)), encoding="utf-8")
    changes = {
        "include": str(entry.yaml_path),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {"test": str(copy_of)},
            "cache_dir": str(folder / "cache"),
            "keep_in_memory": True,
        },
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(changes), encoding="utf-8")
    return rows.name


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a task. Raises `LayershareError` for one whose fields or kinds of values are not the first one's.

    A field that a row lacks, or that is null, would be read as none and scored as the word.
    """
    first: dict[str, str] = {}
    with reading(f"The file '{file}'", "write it again"):
        for where, row in json_lines(require_file(file)):
            if not isinstance(row, dict):
                raise LayershareError(f"{where} is no object with the fields of a row.")
            kinds = dict(_kinds(row))
            known = first or kinds
            if {field for field in kinds if "[" not in field} != {field for field in known if "[" not in field}:
                raise LayershareError(f"{where} does not have the fields of the first line.")
            for field, kind in kinds.items():
                if kind == "NoneType":
                    raise LayershareError(f"{where} has no value for '{field}' (null); give one, or leave the row out.")
                if known.get(field, kind) != kind:
                    raise LayershareError(f"{where} has a '{field}' of type {kind}; above it is {known[field]}.")
            first = kinds | first
            yield row
    if not first:
        raise LayershareError(f"The file '{file}' has no rows.")


def _kinds(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Each value in a row by its place, `choices.text[]`, with its type; whole and other numbers are of one."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _kinds(each, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        yield place, "list"
        for each in value:
            yield from _kinds(each, f"{place}[]")
    else:
        yield place, {"int": "float"}.get(type(value).__name__, type(value).__name__)
        if isinstance(value, str):
            text_of(value, f"The value of '{place}'")


def _load(manager: "TaskManager", name: str, file: str | None, limit: int | None) -> Any:
    """A task or group, zero-shot unless its own configuration says otherwise, every row of which makes a prompt."""
    try:
        loaded: Any = manager.load([name])
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
            for _, row in task.doc_iterator(limit=limit):
                for make in (task.doc_to_text, task.doc_to_target, partial(_choices, task)):
                    make(row)
                if file is not None:
                    _require_answer(task, row)
    except Exception as error:  # whatever data sets, templates and functions of lm-eval's tasks raise
        where = f"of '{file}'" if file else "from the hub"
        hint = "compare its fields with the hub's" if file else "check the connection, or give local files"
        raise LayershareError(f"The task '{name}' cannot use the rows {where} ({reason(error)}); {hint}.") from error
    return loaded


def _require_answer(task: "ConfigurableTask", row: dict[str, Any]) -> None:
    """Raise `ValueError` if the right answer is none of a row's choices, which lm-eval would count as a wrong guess."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    choices = task.doc_to_choice(row)
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError(f"{choices!r:.80} are no choices")
    given: Any = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
    for answer in given if isinstance(given, list) else [given]:
        numbered = isinstance(answer, int | float) and not isinstance(answer, bool)
        if answer not in (range(len(choices)) if numbered else choices):
            raise ValueError(f"the answer {answer!r:.40} is none of {len(choices)} choices")


def _texts(task: "ConfigurableTask", row: dict[str, Any]) -> Iterator[str]:
    """What the model reads of a row."""
    for made in (task.doc_to_text(row), task.doc_to_target(row), _choices(task, row) and task.doc_to_choice(row)):
        yield from (each for each in (made if isinstance(made, list) else [made]) if isinstance(each, str) and each)


def _choices(task: "ConfigurableTask", row: dict[str, Any]) -> int | None:
    """The number of choices, where a task offers some."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    return len(task.doc_to_choice(row))


def _result(tasks: Tasks, name: str, task: "ConfigurableTask | None", values: dict[str, Any]) -> TaskResult:
    """lm-eval's `values` of a task, or of a group if `task` is `None`, with what they are worth."""
    rows = [] if task is None else tasks.rows(task)
    choices = [] if task is None else [count for row in rows if (count := _choices(task, row))]
    chance = fmean(1 / count for count in choices) if choices else None
    scores = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = values.get(f"{metric}_stderr,{kind}")
        stderr = stderr if isinstance(stderr, float) else None  # lm-eval's "N/A"
        near = None
        if chance is not None and stderr is not None and metric.startswith("acc"):
            near = abs(value - chance) <= 2 * stderr
        scores[metric if kind == "none" else f"{metric},{kind}"] = Score(value, stderr, near)
    if task is None:
        return TaskResult(values["sample_len"], scores)
    return TaskResult(
        rows=len(rows),
        scores=scores,
        chance=chance,
        shots=task.get_config("num_fewshot"),
        version=str(task.VERSION),
        source=tasks.files.get(name, str(task.DATASET_PATH)),
        sha256=hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest(),
    )
