"""What a recipe's `evaluation` asks for, a text, zero-shot tasks or both: loaded before and measured after the work."""

from dataclasses import dataclass, replace

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from layershare.calibrate.text import Blocks, Text, block_length, load_text
from layershare.evaluate.divergence import evaluate
from layershare.evaluate.perplexity import Perplexity
from layershare.evaluate.tasks import TaskResult, Tasks, load_tasks, run_tasks
from layershare.progress import Progress, no_progress
from layershare.recipe import EvaluationSettings
from layershare.store import written_with
from layershare.values import Number, Word


@dataclass(frozen=True)
class Measured:
    """What was measured of a model: the fields of `Evaluation` if there was a text, tasks and samples likewise.

    What compares with an original is `None` without one.
    """

    text: Blocks | None = written_with("text")
    dtype: Word | None = written_with("text")
    perplexity: Perplexity | None = written_with("text")
    original_perplexity: Perplexity | None = written_with("text")
    kl: Number | None = written_with("text")
    top1_agreement: Number | None = written_with("text")
    tasks: dict[Word, TaskResult] | None = written_with("tasks")
    original_tasks: dict[Word, TaskResult] | None = written_with("original_tasks")
    samples: list[dict[Word, Word]] | None = written_with("samples")

    def __post_init__(self) -> None:
        if (self.text is None) != (self.perplexity is None):
            raise ValueError("a text and its perplexity belong together")


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
    ) -> Measured:
        """Measure a model, and against its original if that is given. Raises `LayershareError` as `evaluate` does."""
        measured, size = Measured(), self.settings.batch_size
        if self.text is not None:
            found = evaluate(model, self.text, original, batch_size=size, progress=progress)
            measured = Measured(**{**vars(found), "text": Blocks(**found.text)})
        if self.tasks is not None:
            for name, each in (("tasks", model), ("original_tasks", original)):
                if each is not None:
                    scores = run_tasks(self.tasks, each, self.tokenizer, batch_size=size, progress=progress)
                    measured = replace(measured, **{name: scores})
        return measured


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
