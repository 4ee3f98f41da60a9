"""What a recipe's `evaluation` asks for, a text, zero-shot tasks or both: loaded before and measured after the work."""

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from layershare.calibrate.text import Text, block_length, load_text
from layershare.evaluate.divergence import evaluate
from layershare.evaluate.tasks import Tasks, load_tasks, run_tasks
from layershare.progress import Progress, no_progress
from layershare.recipe import Test


@dataclass(frozen=True)
class Trial:
    """A text and tasks to measure models on, of which one may be missing, and the tokenizer that reads them."""

    test: Test
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
        size = self.test.batch_size
        if self.text is not None:
            results = asdict(evaluate(model, self.text, original, batch_size=size, progress=progress))
        if self.tasks is not None:
            for name, each in (("tasks", model), ("original_tasks", original)):
                if each is not None:
                    scores = run_tasks(self.tasks, each, self.tokenizer, batch_size=size, progress=progress)
                    results[name] = {task: asdict(result) for task, result in scores.items()}
        return results


def load_trial(test: Test, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Trial:
    """Load text and tasks for a model of that config: unless told otherwise, `block_length` is how long blocks are.

    Raises as `load_text` and `load_tasks` do.
    """
    text = tasks = None
    vocabulary = config.get_text_config().vocab_size
    if test.text is not None:
        length = block_length(config, test.length)
        text = load_text(test.text, tokenizer, split="test", blocks=test.blocks, length=length, vocabulary=vocabulary)
    if test.tasks:
        tasks = load_tasks(test.tasks, test.tasks_data, test.limit)
        tasks.require_within(vocabulary, tokenizer)
    return Trial(test, tokenizer, text, tasks)
