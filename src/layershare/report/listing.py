"""Results for the terminal: tables of evaluations and of compressed models."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from layershare.disk import size
from layershare.errors import LayershareError
from layershare.folders import WORK
from layershare.report.words import score as score_in_words


def evaluation_table(evaluation: dict[str, Any]) -> Table:
    """One evaluation, as in `results.json`, as a table."""
    text = evaluation["text"]
    table = Table(title=f"{text['source']}, {text['blocks']} blocks of {text['length']} tokens", title_justify="left")
    table.add_column("")
    table.add_column("model", justify="right")
    original = evaluation["original_perplexity"]
    if original is not None:
        table.add_column("original", justify="right")
    name = f"perplexity, blocks of {text['length']:,}"
    table.add_row(name, *(f"{each['value']:.4g}" for each in (evaluation["perplexity"], original) if each))
    if original is not None:
        table.add_row("KL from the original (nats per token)", f"{evaluation['kl']:.4g}", "0")
        table.add_row("top-1 agreement", f"{evaluation['top1_agreement']:.1%}", "100%")
    return table


def speed_table(speed: dict[str, Any]) -> Table:
    """What `bench` measured, as a table."""
    title = f"prompts of {speed['prompt']} tokens, {speed['new']} new ones, {speed['dtype']} on {speed['device']}"
    table = Table(title=title, title_justify="left")
    table.add_column("tokens per second")
    for column in ("batch", "model", *(("original", "ratio") if speed["original"] else ())):
        table.add_column(column, justify="right")
    for rate in speed["rates"]:
        compared = (f"{rate['original']:,.0f}", f"{rate['ratio']:.2f}") if speed["original"] else ()
        table.add_row(rate["phase"], str(rate["batch"]), f"{rate['model']:,.0f}", *compared)
    return table


def tasks_table(evaluation: dict[str, Any]) -> Table:
    """The zero-shot tasks of one evaluation, with what guessing would score."""
    originals = evaluation.get("original_tasks")
    table = Table(title="Zero-shot tasks", title_justify="left")
    table.add_column("task", no_wrap=True)
    for column in ("rows", "guessing", "model", *(["original"] if originals else [])):
        table.add_column(column, justify="right")
    table.add_column("")
    for task, result in evaluation["tasks"].items():
        for metric, score in result["scores"].items():
            both = [score, *([originals[task]["scores"][metric]] if originals else [])]
            table.add_row(
                f"{task}, {metric}",
                str(result["rows"]),
                "" if result["chance"] is None or score["near_chance"] is None else f"{result['chance']:.3f}",
                *map(score_in_words, both),
                "near guessing" if score["near_chance"] else "",
            )
    return table


def listing(folder: Path) -> Table:
    """The finished models below a folder, one line each; other programs' `results.json` are passed over.

    Raises `LayershareError` if there is no such folder.
    """
    if not folder.is_dir():
        raise LayershareError(f"There is no folder '{folder}'.")
    table = Table()
    for column in ("folder", "model", "method"):
        table.add_column(column)
    for column in ("keep", "of", "parameters", "bytes", "perplexity (block)"):
        table.add_column(column, justify="right")
    for path in sorted(folder.rglob("results.json")):
        if (results := _results(path)) is None or WORK in path.parts:
            continue
        after, before = results["after"]["all"], results["before"]["all"]
        healing = results.get("healing")
        measured = results.get("evaluation", {}) if healing is None else healing.get("evaluation", {}).get("after", {})
        table.add_row(
            str(path.parent.relative_to(folder)),
            results["model"],
            results["method"] + (", healed" if healing else ""),
            str(results["keep"]),
            results["of"],
            f"{after['parameters']:,} ({after['parameters'] / before['parameters']:.1%})",
            size(after["bytes"]),
            f"{measured['perplexity']['value']:.4g} ({measured['text']['length']:,})"
            if "perplexity" in measured
            else "",
        )
    return table


def _results(path: Path) -> dict[str, Any] | None:
    """The results of a run, `None` if the file is something else or damaged."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(results, dict) and {"model", "method", "keep", "of", "before", "after"} <= set(results)
    return results if ours else None
