"""Tables for the terminal: methods, evaluations and compressed models."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from layershare.calibrate.text import Blocks
from layershare.errors import LayershareError
from layershare.evaluate.evaluator import Measured
from layershare.evaluate.tasks import TaskResult
from layershare.folders import WORK, was_compressed
from layershare.foreign import read_mapping, reading
from layershare.manifest import require_whole
from layershare.methods.catalogue import Entry
from layershare.report.results import RESULTS, Listed, Speed, read_as
from layershare.report.runs import printable, short
from layershare.report.words import score as score_in_words
from layershare.units import brief_count, percent, size

_CAPTION = "In brackets behind a perplexity: the tokens of a block."


def methods_table(entries: list[Entry]) -> Table:
    """The methods for a terminal, each beside its name."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for entry in entries:
        paper = "" if entry.paper is None else f" Paper: {' '.join(entry.paper.split()[-2:])}."
        table.add_row(entry.name, f"{entry.does}\nNeeds {entry.needs}. Sizes: {entry.sizes}.{paper}")
    return table


def evaluation_table(text: Blocks, measured: Measured) -> Table:
    """What was measured on a text, as a table."""
    table = Table(title=f"{text.source}, {text.blocks} blocks of {text.length} tokens", title_justify="left")
    table.add_column("")
    table.add_column("model", justify="right")
    original = measured.original_perplexity
    if original is not None:
        table.add_column("original", justify="right")
    name = f"perplexity, blocks of {text.length:,}"
    table.add_row(name, *(f"{each.value:.4g}" for each in (measured.perplexity, original) if each))
    if original is not None:
        table.add_row("KL from the original (nats per token)", f"{measured.kl:.4g}", "0")
        table.add_row("top-1 agreement", f"{measured.top1_agreement:.1%}", "100%")
    return table


def speed_table(speed: Speed) -> Table:
    """What `bench` measured, as a table."""
    title = f"prompts of {speed.prompt} tokens, {speed.new} new ones, {speed.dtype} on {speed.device}, {speed.engine}"
    table = Table(title=title, title_justify="left")
    for column in ("", "batch", "model", *(("original", "ratio") if speed.original else ())):
        table.add_column(column, justify="right" if column else "left")
    for rate in speed.rates:
        compared = (f"{rate.original:,.0f}", f"{rate.ratio:.2f}") if speed.original else ()
        table.add_row(f"{rate.phase}, tokens per second", str(rate.batch), f"{rate.model:,.0f}", *compared)
    for rate in speed.rates:
        name = "first token" if rate.phase == "prefill" else "next token"
        both = (f"{1000 * each:,.1f}" for each in (rate.latency, rate.original_latency) if each is not None)
        table.add_row(f"{name}, ms", str(rate.batch), *both)
    both = [size(each) for each in (speed.memory, speed.original_memory) if each is not None]
    what = "memory of the engine" if speed.of_an_engine else "memory of weights"
    table.add_row(what, "", *both, *([f"{speed.memory / speed.original_memory:.2f}"] if speed.original_memory else []))
    return table


def tasks_table(tasks: dict[str, TaskResult], originals: dict[str, TaskResult] | None) -> Table:
    """Zero-shot tasks, with what guessing would score."""
    table = Table(title="Zero-shot tasks", title_justify="left")
    table.add_column("task", no_wrap=True)
    for column in ("rows", "guessing", "model", *(["original"] if originals else [])):
        table.add_column(column, justify="right")
    table.add_column("")
    for task, result in tasks.items():
        for metric, score in result.scores.items():
            both = [score, *([originals[task].scores[metric]] if originals else [])]
            table.add_row(
                f"{task}, {metric}",
                str(result.rows),
                "" if result.chance is None or score.near_chance is None else f"{result.chance:.3f}",
                *map(score_in_words, both),
                "near guessing" if score.near_chance else "",
            )
    return table


def listing(folder: Path) -> tuple[Table, list[str]]:
    """The finished models below a folder, one line each, and a sentence for each one whose results cannot be read.

    Other programs' `results.json` are passed over. Raises `LayershareError` if there is no such folder.
    """
    if not folder.is_dir():
        raise LayershareError(f"There is no folder '{folder}'.")
    table, unreadable = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, caption=_CAPTION, caption_justify="left"), []
    for column in ("folder", "model", "method"):
        table.add_column(column, overflow="fold")
    for column in ("size", "kept", "on disk", "perplexity"):
        table.add_column(column, justify="right", no_wrap=True)
    for place in _places(folder):
        name = printable(str(place.relative_to(folder)))
        try:
            with reading(f"{name}: its {RESULTS}", "delete it, or make the model again"):
                require_whole(place, weights=False)
                table.add_row(*map(Text, (name, *_row(read_as(Listed, place / RESULTS)))))
        except LayershareError as error:
            if _ours(place):
                unreadable.append(str(error))
    return table, unreadable


def _row(results: Listed) -> list[str]:
    """A model's line, without its folder."""
    after, before, measured = results.after.all, results.before.all, results.measured
    method = results.method if results.of == "all" else f"{results.method}, {results.keep} of {results.of}"
    return [
        short(results.model),
        printable(method) + results.after_words,
        brief_count(after.parameters),
        percent(after.parameters / before.parameters, 1),
        size(after.bytes),
        f"{measured.perplexity.value:.4g} ({measured.text.length})" if measured.perplexity and measured.text else "",
    ]


def _places(folder: Path) -> Iterator[Path]:
    """The folders below, links not followed, that have results, in order; those that cannot be entered are left out."""
    for place, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if name != WORK)
        if RESULTS in files:
            yield Path(place)


def _ours(place: Path) -> bool:
    """Whether results that cannot be read are those of a run: they lie beside its plan, or have our keys."""
    if was_compressed(place):
        return True
    with suppress(LayershareError), reading(RESULTS, "it is not ours"):
        return {"model", "method", "keep", "of", "before", "after"} <= read_mapping(place / RESULTS).keys()
    return False
