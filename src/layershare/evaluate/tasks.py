"""Zero-shot tasks through lm-eval (the extra `eval`): its stock tasks, prompts and metrics, on a model in memory.

The rows come from the hub, or from a folder with one `TASK.jsonl` per task, rows in the hub's schema: then a YAML
that includes the stock one and changes nothing but where the rows are.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layershare.calibrate.drivers import evaluating
from layershare.calibrate.text import json_lines
from layershare.errors import LayershareError, how_to_install, unknown

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


def load_tasks(names: Sequence[str], data: str | Path | None = None, limit: int | None = None) -> Tasks:
    """Find tasks (`papers` stands for seven) and their rows, on the hub or as `TASK.jsonl` in the folder `data`.

    Raises `LayershareError` if lm-eval is not installed, a task unknown, a file missing, or rows are not the task's.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise LayershareError(f"Tasks need lm-eval: {how_to_install('eval')}.") from error
    names = list(dict.fromkeys(each for name in names for each in (PAPERS if name == ALL_SEVEN else (name,))))
    stock = _stock_tasks(names)
    for name in names:
        if name not in stock.all_tasks:
            raise unknown("task", name, [*stock.all_tasks, ALL_SEVEN])
    if data is None:
        return Tasks({name: _load(stock, name, None, limit) for name in names}, {}, limit)
    with TemporaryDirectory(prefix="layershare-") as folder:
        files = {name: _include_with_rows(stock, name, Path(data), Path(folder)) for name in names}
        local = TaskManager(include_path=folder, include_defaults=False)
        return Tasks({name: _load(local, name, files[name], limit) for name in names}, files, limit)


def run_tasks(
    tasks: Tasks,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, TaskResult]:
    """Measure a model on tasks, by name of task, and of group where one was asked for."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    results: dict[str, TaskResult] = {}
    with evaluating(model):
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
    """lm-eval's index, of the papers' folders alone where they suffice."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    if not set(names) <= set(PAPERS):
        return TaskManager()
    root = Path(lm_eval.__file__).parent / "tasks"
    return TaskManager(include_path=sorted({root / PAPERS[name] for name in names}), include_defaults=False)


def _include_with_rows(stock: "TaskManager", name: str, data: Path, folder: Path) -> str:
    """Write the YAML that takes the rows of a stock task from `data`; returns the name of their file."""
    entry, rows = stock.task_index[name], data / f"{name}.jsonl"
    if entry.kind.name != "TASK" or entry.yaml_path is None:
        raise LayershareError(f"'{name}' stands for several tasks; name those that '{data}' has rows for.")
    if not rows.is_file():
        raise LayershareError(f"There is no file '{rows}' with the rows of the task '{name}'.")
    _require_same_fields(rows)
    changes = {
        "include": str(entry.yaml_path),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {"test": str(rows.absolute())},
            "cache_dir": str(folder / "cache"),
            "keep_in_memory": True,
        },
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(changes), encoding="utf-8")
    return rows.name


def _require_same_fields(file: Path) -> None:
    """A field that one row lacks would be read as none and scored as the word."""
    fields: set[str] | None = None
    for number, row in enumerate(json_lines(file), start=1):
        if not isinstance(row, dict) or (fields is not None and row.keys() != fields):
            raise LayershareError(f"Line {number} of '{file.name}' does not have the fields of the first line.")
        fields = set(row)


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
    except Exception as error:  # whatever data sets, templates and functions of lm-eval's tasks raise
        where = f"of '{file}'" if file else "from the hub"
        hint = "compare its fields with the hub's" if file else "check the connection, or give local files"
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise LayershareError(f"The task '{name}' cannot use the rows {where} ({reason}); {hint}.") from error
    return loaded


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
