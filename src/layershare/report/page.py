"""The page: one HTML file with everything in it, to be read without network, in light or dark, on a phone or a desk."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Any

from layershare.disk import OTHER_FILE, writing
from layershare.errors import LayershareError, how_to_install
from layershare.evaluate.evaluator import Measured
from layershare.foreign import reading, reason
from layershare.plan.budget import Size
from layershare.report.card import card, citation
from layershare.report.runs import AGAIN, SPEED, Run
from layershare.report.words import (
    blocks,
    calibration,
    compared,
    digits_of,
    edits,
    healed,
    healing,
    held,
    in_blocks,
    loading,
    made_in,
    method_of,
    options,
    perplexities,
    scores,
    sizes,
    story,
)
from layershare.store import write_atomically
from layershare.units import count, percent, size


def write_pages(folder: Path, name: str) -> None:
    """Write a finished run's `README.md` and, where the report extra is installed, its `report.html`.

    `name` is what the page calls the run. What cannot be made is left out, with a warning: the run is finished without.
    """
    pages: dict[str, Callable[[Run], str]] = {"README.md": card}
    if _installed():
        pages["report.html"] = lambda run: page([run], interactive=False)
    else:
        warnings.warn(f"To get report.html in every run: {how_to_install('report')}.", stacklevel=2)
    for file, make in pages.items():
        try:
            write_atomically(folder / file, make(Run.read(folder, name)).encode("utf-8", "replace"))
        except Exception as error:  # noqa: PERF203  # whatever it is, it must not cost the work that is done
            warnings.warn(f"The result has no {file} ({reason(error)}), but all else.", stacklevel=2)


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write one page about the runs in these folders.

    Raises `LayershareError` if a folder is no finished run, the file cannot be written or the extra is missing.
    """
    if not _installed():
        raise LayershareError(f"The report needs jinja2 and plotly: {how_to_install('report')}.")
    text = page([Run.read(folder, str(folder)) for folder in folders])
    with writing(out, OTHER_FILE):
        write_atomically(out, text.encode("utf-8", "replace"))


def page(runs: Sequence[Run], *, interactive: bool = True) -> str:
    """The page as HTML, with charts that tell their values when pointed at (5 MB of plotly), or drawn once for all.

    Raises `LayershareError` if there is something in a run's files that cannot be shown.
    """
    from plotly.offline import get_plotlyjs

    charts = []
    for run in runs:
        with reading(f"The results of '{run.name}'", AGAIN):
            charts.append((run, _figures(run)))
    names = "', '".join(run.name for run in runs)
    with reading(f"The results of '{names}'", AGAIN):
        return _template().render(
            title=_title(runs),
            runs=charts,
            together=_together(runs),
            rows=_rows(runs),
            speed_file=SPEED,
            plotly=get_plotlyjs() if interactive else None,
        )


@cache
def _template() -> Any:
    """The page's template, which takes longer to compile than to fill in."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from layershare.report.svg import draw

    environment = Environment(
        loader=PackageLoader("layershare.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (
        *(blocks, calibration, citation, count, digits_of, draw, edits, healed, healing, held, in_blocks, loading),
        *(compared, made_in, options, percent, quote, scores, size, sizes, story),
    )
    environment.filters |= {words.__name__: words for words in filters}
    return environment.get_template("page.html")


def _installed() -> bool:
    return all(find_spec(name) for name in ("jinja2", "plotly"))


def _title(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return story(runs[0])
    models = {run.model for run in runs}
    least, most = min(run.kept for run in runs), max(run.kept for run in runs)
    sizes = percent(least) if percent(least) == percent(most) else f"{least:.0%}–{percent(most)}".replace("%–", "–")
    what = f"versions of {models.pop()}" if len(models) == 1 else "compressed models"
    return f"{len(runs)} {what}, at {sizes} of {'its' if not models else 'their'} size"


def _together(runs: Sequence[Run]) -> dict[str, Any]:
    """Charts of quality against size, if there is anything to compare."""
    from layershare.report import figures

    models = figures.points(runs)
    if len(runs) < 2 or not models:
        return {}
    return {
        "Perplexity": figures.quality(models, "perplexity", lambda point: point.perplexity),
        "Distance from the original": figures.quality(models, "KL divergence, nats per token", lambda point: point.kl),
    }


def _figures(run: Run) -> dict[str, Any]:
    """The charts of one run."""
    from layershare.report import figures

    factored = any(cell.rank for cell in run.cells.values())
    return {
        "sharing": figures.sharing(run) if any(cell.kind != "own" for cell in run.cells.values()) else None,
        "values": {
            "Kept, % of parameters": figures.kept(run),
            **({"Rank": figures.ranks(run)} if factored else {}),
            **({"Bits of a number": figures.bits(run)} if any(cell.bits for cell in run.cells.values()) else {}),
            **({"Relative error, %": figures.errors(run)} if any(c.error for c in run.cells.values()) else {}),
        },
        "spectra": figures.spectra(run),
        "healing": figures.healing(run.healing.log) if run.healing else None,
    }


def _rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The comparison, a row per model: each original before the first run that is compared with it."""
    rows, seen = [], set()
    measured = {run.results.model_fingerprint for run in runs if run.evaluation}
    for run in runs:
        evaluation, fingerprint = run.evaluation, run.results.model_fingerprint
        ours, original = perplexities(run) if evaluation else (None, None)
        if (fingerprint, original) not in seen and (evaluation or fingerprint not in measured):
            seen.add((fingerprint, original))
            same = replace(evaluation, kl=0.0, top1_agreement=1.0) if evaluation else None
            rows.append(_row(run.model, "original", run.results.before.all, 1.0, original, same))
        rows.append(_row(run.name, method_of(run), run.results.after.all, run.kept, ours, evaluation))
    return rows


def _row(
    name: str, method: str, size: Size, kept: float, perplexity: float | None, measured: Measured | None
) -> dict[str, Any]:
    return {
        "name": name,
        "method": method,
        **vars(size),
        "kept": kept,
        "perplexity": perplexity,
        "block": measured.text.length if measured and measured.text else None,
        "kl": measured and measured.kl,
        "agreement": measured and measured.top1_agreement,
    }
