"""What a recipe's `evaluation` asks for, a text, zero-shot tasks or both: loaded before and measured after the work."""

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from layershare.calibrate.text import Text, block_length, load_text
from layershare.evaluate.divergence import evaluate
from layershare.evaluate.tasks import Tasks, load_tasks, run_tasks
from layershare.progress import Progress, no_progress
from layershare.recipe import EvaluationSettings


@dataclass(frozen=True)
class Evaluator:
    """A text and tasks to measure models on, of which one may be missing, and the tokenizer that reads them."""

    settings: EvaluationSettings
    tokenizer: PreTrainedTokenizerBase
    text: Text | None
    tasks: Tasks | None

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages beside the usual ones whose versions matter for the numbers."""
        return ("lm_eval",) if self.tasks else ()

    def measure(
        self,
        model: PreTrainedModel,
        original: PreTrainedModel | None,
        progress: Progress = no_progress,
    ) -> dict[str, Any]:
        """The fields of `Evaluation` if there is a text; `tasks` and, given an original, `original_tasks` if there are.

        Raises `LayershareError` as `evaluate` does.
        """
        results: dict[str, Any] = {}
        size = self.settings.batch_size
        if self.text is not None:
            results = asdict(evaluate(model, self.text, original, batch_size=size, progress=progress))
        if self.tasks is not None:
            for name, each in (("tasks", model), ("original_tasks", original)):
                if each is not None:
                    scores = run_tasks(self.tasks, each, self.tokenizer, batch_size=size, progress=progress)
                    results[name] = {task: asdict(result) for task, result in scores.items()}
        return results


def load_evaluator(
    settings: EvaluationSettings, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> Evaluator:
    """Load text and tasks for a model of that config: unless told otherwise, `block_length` is how long blocks are.

    Raises as `load_text` and `load_tasks` do.
    """
    text = tasks = None
    vocabulary = config.get_text_config().vocab_size
    if settings.text is not None:
        length = block_length(config, settings.length)
        text = load_text(
            settings.text, tokenizer, split="test", blocks=settings.blocks, length=length, vocabulary=vocabulary
        )
    if settings.tasks:
        tasks = load_tasks(settings.tasks, settings.tasks_data, settings.limit)
        tasks.require_within(vocabulary, tokenizer)
    return Evaluator(settings, tokenizer, text, tasks)
