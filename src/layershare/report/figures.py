"""The charts of the page. Colours that follow light and dark (text, grids, background) are set by the page's script."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from plotly import graph_objects as go

from layershare.report.runs import Cell, Run
from layershare.report.words import perplexities
from layershare.units import count, percent, size

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's colours that show on white and on black: told apart with every kind of colour vision."""
_FAINT, _GREY = "rgba(128,128,128,0.14)", "rgba(128,128,128,0.42)"
_FIRST, _LAST = (0, 114, 178), (230, 159, 0)
"""First and last layer; blue to orange keeps its order without colour vision."""
_FLOOR = 1e-7
"""Where spectra leave the chart: below it is rounding."""
_COLOURS = {"dense": _FAINT, "own": _GREY, "merge": "#8c8c8c", "gone": "#3c3c3c", "other": "#999933"}
"""Of cells that do not share, by kind."""


@dataclass(frozen=True)
class Point:
    """One model in a chart of quality against size: a run, or the original that it is compared with."""

    name: str
    parameters: int
    bytes: int
    kept: float
    perplexity: float
    kl: float


def measured_alike(run: Run) -> tuple[str, str, str]:
    """What must agree for two runs' measurements to be comparable: the original, the tokens, the dtype."""
    measured = run.evaluation
    assert measured is not None
    assert measured.text is not None
    return run.results.model_fingerprint, measured.text.tokens_sha256, measured.dtype or ""


def points(runs: Sequence[Run]) -> list[list[Point]]:
    """The measured runs as points, those that are comparable in one list, which the original leads."""
    lists: dict[tuple[str, str, str], list[Point]] = {}
    for run in runs:
        if (evaluation := run.evaluation) is None:
            continue
        before, after = run.results.before.all, run.results.after.all
        ours, theirs = perplexities(run)
        original = Point(run.model, before.parameters, before.bytes, 1.0, theirs, 0.0)
        lists.setdefault(measured_alike(run), [original]).append(
            Point(run.name, after.parameters, after.bytes, run.kept, ours, evaluation.kl or 0.0)
        )
    return list(lists.values())


def frontier(models: Sequence[Point], worth: Callable[[Point], float]) -> list[Point]:
    """The models that no other one beats: none is as small and better, by size. Lower `worth` is better."""
    best: list[Point] = []
    for point in sorted(models, key=lambda each: (each.bytes, worth(each))):
        if not best or worth(point) < worth(best[-1]):
            best.append(point)
    return best


def quality(models: Sequence[Sequence[Point]], title: str, worth: Callable[[Point], float]) -> go.Figure:
    """Quality against bytes on disk, the frontier as a line through filled points, the others hollow."""
    figure = go.Figure()
    sizes = [point.bytes for comparable in models for point in comparable]
    middle = (min(sizes) + max(sizes)) / 2
    unit, factor = ("GB", 1e9) if max(sizes) >= 1e9 else ("MB", 1e6)
    for number, comparable in enumerate(models):
        colour = PALETTE[number % len(PALETTE)]
        best = frontier(comparable, worth)
        figure.add_scatter(
            x=[point.bytes / factor for point in best],
            y=[worth(point) for point in best],
            mode="lines",
            line={"color": colour, "width": 1.5, "dash": "dot"},
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=[point.bytes / factor for point in comparable],
            y=[worth(point) for point in comparable],
            mode="markers+text",
            text=[_label(point.name) for point in comparable],
            textposition=[
                "bottom left" if point.kept == 1 else "top left" if point.bytes > middle else "top right"
                for point in comparable
            ],
            marker={
                "size": 11,
                "color": colour,
                "symbol": ["circle" if point in best else "circle-open" for point in comparable],
                "line": {"width": 2, "color": colour},
            },
            hovertext=[
                f"<b>{point.name}</b><br>{size(point.bytes)} ({percent(point.kept, 1)}), "
                f"{count(point.parameters)} parameters<br>"
                f"perplexity {point.perplexity:.4g}, KL {point.kl:.3g}<br>"
                f"{'on the frontier' if point in best else 'another one is no larger and better'}"
                for point in comparable
            ],
            hoverinfo="text",
            cliponaxis=False,
        )
    figure.update_layout(showlegend=False, height=340, margin={"l": 8, "r": 8, "t": 16, "b": 8})
    figure.update_xaxes(title=f"{unit} on disk", automargin=True, zeroline=False)
    figure.update_yaxes(title=title, automargin=True, zeroline=False)
    return _plain(figure)


def healing(log: Sequence[dict[str, Any]]) -> go.Figure:
    """The loss while training, and the held-out loss, by step."""
    figure = go.Figure()
    for number, (key, name) in enumerate((("loss", "training loss"), ("held_out_loss", "held-out cross-entropy"))):
        line = [(entry["step"], entry[key]) for entry in log if key in entry]
        figure.add_scatter(
            x=[step for step, _ in line],
            y=[loss for _, loss in line],
            name=name,
            mode="lines+markers" if number else "lines",
            line={"color": PALETTE[number], "width": 1.5},
            hovertemplate=f"step %{{x}}: {name} %{{y:.4f}}<extra></extra>",
        )
    figure.update_layout(height=260, margin={"l": 8, "r": 8, "t": 8, "b": 8}, legend={"orientation": "h", "y": 1.1})
    figure.update_xaxes(title="step", automargin=True, zeroline=False)
    figure.update_yaxes(title="nats per token", automargin=True, zeroline=False)
    return _plain(figure)


def sharing(run: Run) -> go.Figure:
    """Who shares with whom: layers × roles, a colour and a letter per group of a role, δ where a delta is added."""
    kinds, colours = list(_COLOURS), [*_COLOURS.values(), *PALETTE]

    def colour(cell: Cell) -> int:
        if not cell.shares:
            kind = cell.kind if cell.kind in kinds else "other"
            return kinds.index(kind if cell.kept != 0 else "gone")
        assert cell.group is not None
        return len(kinds) + (cell.group + 2 * run.roles.index(cell.places[0].role)) % len(PALETTE)

    def word(cell: Cell) -> str:
        if cell.shares:
            assert cell.group is not None
            return _letters(cell.group) + ("δ" if cell.kind == "delta" else "")
        return "×" if cell.kept == 0 else "+" if cell.kind == "merge" else ""

    return _map(run, colour, word, colours=_steps(colours), ends=(-0.5, len(colours) - 0.5))


def kept(run: Run) -> go.Figure:
    """The fraction of each matrix's parameters that is left."""

    def word(cell: Cell) -> str:
        return "" if cell.kept is None else f"{100 * cell.kept:.0f}"

    return _map(run, lambda cell: cell.kept, word, ends=(0, 1), bar={"tickformat": ".0%"})


def ranks(run: Run) -> go.Figure:
    """The rank of each factored matrix."""

    def word(cell: Cell) -> str:
        return "" if cell.rank is None else str(cell.rank)

    return _map(run, lambda cell: cell.rank, word, ends=(0, max(cell.rank or 0 for cell in run.cells.values())))


def bits(run: Run) -> go.Figure:
    """The bits of a number of each matrix that is stored as integers."""

    def word(cell: Cell) -> str:
        return "" if cell.bits is None else str(cell.bits)

    return _map(run, lambda cell: cell.bits, word, ends=(0, 8))


def errors(run: Run) -> go.Figure:
    """The relative error of each group, repeated in all its members; the colours go by its logarithm."""
    powers = [math.floor(math.log10(cell.error)) for cell in run.cells.values() if cell.error]
    ends = (min(powers), max(powers) + 1)

    def height(cell: Cell) -> float | None:
        return None if cell.error is None else math.log10(cell.error) if cell.error else ends[0]

    def word(cell: Cell) -> str:
        return "" if cell.error is None else f"{100 * cell.error:.{1 if cell.error < 1e-3 else 2}g}".removeprefix("0")

    ticks = range(ends[0], ends[1] + 1)
    bar = {"tickvals": list(ticks), "ticktext": [f"{100 * 10.0**power:.12g}%" for power in ticks]}
    return _map(run, height, word, ends=ends, bar=bar)


def spectra(run: Run) -> dict[str, go.Figure]:
    """Role -> the spectra of its groups with the cuts, for the roles that have any."""
    figures = {}
    for role in run.roles:
        groups = {cell.places: cell for cell in run.cells.values() if cell.role == role and cell.spectrum}
        if groups:
            figures[role] = _spectrum(run, list(groups.values()))
    return figures


def _spectrum(run: Run, groups: Sequence[Cell]) -> go.Figure:
    figure = go.Figure()
    rest: dict[str, list[Any]] = defaultdict(list)
    for cell in groups:
        assert cell.spectrum is not None
        assert cell.rank is not None
        # A logarithmic axis has no place for zero.
        line = [(i, s) for i, s in zip(cell.spectrum.index, cell.spectrum.share, strict=True) if s > 0]
        before = [point for point in line if point[0] <= cell.rank]
        after = [point for point in line if point[0] >= cell.rank]
        rest["x"] += [*(i for i, _ in after), None]
        rest["y"] += [*(s for _, s in after), None]
        where = cell.layers[0] / max(run.n_layers - 1, 1)
        colour = "rgb({},{},{})".format(*(round(a + where * (b - a)) for a, b in zip(_FIRST, _LAST, strict=True)))
        figure.add_scatter(
            x=[i for i, _ in before],
            y=[s for _, s in before],
            mode="lines+markers",
            line={"color": colour, "width": 1.5},
            marker={"size": [0] * (len(before) - 1) + [7], "opacity": 1, "line": {"width": 0}},
            hovertemplate=f"{cell.together}, component %{{x}}: %{{y:.3%}}<extra></extra>",
        )
    figure.add_scatter(
        **rest, mode="lines", line={"color": "rgba(128,128,128,0.5)", "width": 1}, hoverinfo="skip", connectgaps=False
    )
    figure.update_layout(showlegend=False, height=210, margin={"l": 8, "r": 8, "t": 8, "b": 8})
    figure.update_xaxes(automargin=True, zeroline=False, nticks=5)
    lowest = min((share for share in rest["y"] if share), default=1.0)
    figure.update_yaxes(
        type="log", range=[math.log10(max(lowest, _FLOOR)), 0.2], automargin=True, exponentformat="power", dtick=2
    )
    return _plain(figure)


def _map(
    run: Run,
    value: Callable[[Cell], float | None],
    word: Callable[[Cell], str],
    *,
    ends: tuple[float, float],
    colours: Any = "Cividis",
    bar: dict[str, Any] | None = None,
) -> go.Figure:
    """Layers × roles, coloured by a value, with a word in each cell (left out by the script where there is no room)."""
    layers, roles = range(run.n_layers), run.roles[::-1]  # the first role on top
    grid = [[run.cells.get((role, layer)) for layer in layers] for role in roles]
    figure = go.Figure(
        go.Heatmap(
            x=[str(layer) for layer in layers],
            y=roles,
            z=[[None if cell is None else value(cell) for cell in row] for row in grid],
            hovertext=[["" if cell is None else describe_cell(cell) for cell in row] for row in grid],
            hoverinfo="text",
            xgap=2,
            ygap=2,
            colorscale=colours,
            zmin=ends[0],
            zmax=ends[1],
            showscale=colours == "Cividis",
            colorbar={"thickness": 8, "outlinewidth": 0, "nticks": 5, "xpad": 4, **(bar or {})},
            text=[["" if cell is None else word(cell) for cell in row] for row in grid],
            texttemplate="%{text}",
            textfont={"size": 10},
        )
    )
    figure.update_layout(height=52 + 26 * len(roles), margin={"l": 8, "r": 8, "t": 8, "b": 8})
    figure.update_xaxes(title="layer", type="category", automargin=True, showgrid=False, ticks="", nticks=16)
    figure.update_yaxes(automargin=True, showgrid=False, ticks="")
    return _plain(figure)


def describe_cell(cell: Cell) -> str:
    """All that is known of one linear, for hovering."""
    words = {
        "dense": "unchanged",
        "own": "own factors",
        "share": f"basis shared by {cell.together} ({cell.side} side)",
        "anchor": f"weight shared by {cell.together}",
        "delta": f"weight shared by {cell.together}, and a delta of its own",
        "merge": f"merged with {cell.together}",
        "drop": "dropped",
    }
    lines = [f"<b>{cell.role}, layer {cell.layer}</b>", words.get(cell.kind, cell.kind)]
    if cell.rank is not None:
        lines.append(f"rank {cell.rank:,}")
    if cell.bits is not None:
        lines.append(f"integers of {cell.bits} bits")
    if cell.kept is not None:
        lines.append(f"{percent(cell.kept, 1)} of its parameters kept")
    if cell.error is not None:
        lines.append(f"relative error {percent(cell.error, 2)}")
    return "<br>".join(lines)


def _label(name: str) -> str:
    """A name that a phone has room for: of a path the last part."""
    label = name.rstrip("/").rpartition("/")[2]
    return label if len(label) <= 24 else f"{label[:23]}…"


def _letters(number: int) -> str:
    """A, B, … Z, AA, AB, …"""
    return (_letters(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


def _steps(colours: Sequence[str]) -> list[tuple[float, str]]:
    """A colour scale of flat steps, one per whole number."""
    n = len(colours)
    return [(edge, colour) for i, colour in enumerate(colours) for edge in (i / n, (i + 1) / n)]


def _plain(figure: go.Figure) -> go.Figure:
    """Without plotly's own template, which has colours for white paper only."""
    return figure.update_layout(template=None, dragmode=False, hovermode="closest")
