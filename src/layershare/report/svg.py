"""Charts as static SVG, for pages that are written by every run: the kinds of traces that `figures` uses, no more.

Colours that follow light and dark are the page's; sizes are in the drawing's own units, which the page scales.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from typing import Any

_ROW, _BAR, _LETTER = 17, 46, 5.2
"""Heights of a map's rows, width of its colour bar with labels, width of a letter."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_Point = tuple[float, float]


def draw(figure: Any, width: int = 400) -> str:
    """A plotly figure of one heat map, or of lines, as an `<svg>` so many units wide."""
    heatmap = figure.data[0].type == "heatmap"
    parts, height = _map(figure.data[0], width) if heatmap else _lines(figure, width, 0.55 * width)
    return f'<svg viewBox="0 0 {width} {height:g}">{"".join(parts)}</svg>'


def _map(trace: Any, width: int) -> tuple[list[str], float]:
    """The parts of a heat map, and its height."""
    left = 8 + _LETTER * max(map(len, trace.y))
    inner = width - left - (_BAR if trace.showscale else 4)
    step, height = inner / len(trace.x), _ROW * len(trace.y)
    same_colour: dict[str, list[str]] = {}
    words = []
    longest = max(len(word) for row in trace.text for word in row)
    for row, (values, texts) in enumerate(zip(reversed(trace.z), reversed(trace.text), strict=True)):
        for column, (value, word) in enumerate(zip(values, texts, strict=True)):
            if value is None:
                continue
            x, y = left + column * step, row * _ROW
            colour, ink = _colour(trace.colorscale, (value - trace.zmin) / ((trace.zmax - trace.zmin) or 1))
            same_colour.setdefault(colour, []).append(
                f"M{x:.1f} {y + 1}h{step - 1.2:.1f}v{_ROW - 2}h-{step - 1.2:.1f}z"
            )
            if word and longest * 4.4 < step:
                words.append(_text(x + step / 2, y + 11.5, word, more=f' class="word" fill="{ink}"'))
    parts = [f'<path fill="{colour}" d="{"".join(cells)}"/>' for colour, cells in same_colour.items()]
    parts += words
    parts += [_text(left - 5, row * _ROW + 11.5, name, "end") for row, name in enumerate(reversed(trace.y))]
    every = -(-len(trace.x) // 16)
    parts += [_text(left + (i + 0.5) * step, height + 11, trace.x[i]) for i in range(0, len(trace.x), every)]
    parts.append(_text(left + inner / 2, height + 24, "layer"))
    if trace.showscale:
        parts += _bar(trace, left + inner + 5, height)
    return parts, height + 30


def _bar(trace: Any, x: float, height: float) -> list[str]:
    """The colour bar of a heat map, with its ends labelled."""
    steps = 24
    each = height / steps
    parts = [
        f'<path fill="{_colour(trace.colorscale, (i + 0.5) / steps)[0]}" '
        f'd="M{x:.1f} {height - (i + 1) * each:.1f}h6v{each + 0.3:.1f}h-6z"/>'
        for i in range(steps)
    ]
    labels = trace.colorbar.ticktext or [
        format(end, trace.colorbar.tickformat or "g") for end in (trace.zmin, trace.zmax)
    ]
    return [*parts, _text(x + 9, height - 1, labels[0], "start"), _text(x + 9, 8, labels[-1], "start")]


def _lines(figure: Any, width: int, height: float) -> tuple[list[str], float]:
    """The parts of a chart of lines, and its height."""
    logarithmic = figure.layout.yaxis.type == "log"
    points = [[*_points(trace, logarithmic, figure.layout.yaxis.range)] for trace in figure.data]
    known = [point for line in points for point in line if point is not None]
    if not known:
        return [], 0
    titles = bool(figure.layout.xaxis.title.text)
    left, top, right, bottom = 38, 16 if titles else 6, width - 6, height - (32 if titles else 18)
    low, high = figure.layout.yaxis.range or _ends(y for _, y in known)
    first, last = _ends(x for x, _ in known)

    def place(point: _Point) -> _Point:
        x, y = point
        return left + (x - first) / (last - first) * (right - left), bottom - (y - low) / (high - low) * (bottom - top)

    parts = []
    for y in _ticks(low, high, whole=logarithmic):
        _, at = place((first, y))
        label = f"10{str(round(y)).translate(_SUPERSCRIPTS)}" if logarithmic else f"{y:g}"
        parts += [f'<path class="rule" d="M{left} {at:.1f}H{right}"/>', _text(left - 4, at + 3, label, "end")]
    parts += [_text(place((x, low))[0], bottom + 12, f"{x:g}") for x in _ticks(first, last, whole=True)]
    if titles:
        parts.append(_text((left + right) / 2, bottom + 25, figure.layout.xaxis.title.text))
    named = left
    for trace, line in zip(figure.data, points, strict=True):
        path, fresh = "", True
        for point in line:
            path += "" if point is None else "{}{:.1f} {:.1f}".format("M" if fresh else "L", *place(point))
            fresh = point is None
        parts.append(f'<path class="line" stroke="{trace.line.color}" d="{path}"/>')
        if "markers" in trace.mode and line and line[-1] is not None:
            x, y = place(line[-1])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{trace.line.color}"/>')
        if trace.name:
            parts.append(_text(named, 9, trace.name, "start", more=f' fill="{trace.line.color}"'))
            named += _LETTER * len(trace.name) + 14
    return parts, height


def _points(trace: Any, logarithmic: bool, ends: _Point | None) -> Iterable[_Point | None]:
    """A line's points, `None` where it is interrupted or leaves the chart."""
    for x, y in zip(trace.x, trace.y, strict=True):
        height = math.nan if y is None or (logarithmic and y <= 0) else math.log10(y) if logarithmic else y
        low, high = ends or (-math.inf, math.inf)
        yield (x, height) if math.isfinite(height) and low <= height <= high else None


def _ends(values: Iterable[float]) -> _Point:
    """Where an axis begins and ends: a little outside of its values."""
    low, high = min(values := [*values]), max(values)
    room = 0.03 * (high - low) or abs(high) or 1
    return low - room, high + room


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About five round numbers between two, `whole` ones if need be."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 5, 10) if each * power >= rough)
    step = max(1, step) if whole else step
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _colour(scale: Sequence[tuple[float, str]], where: float) -> tuple[str, str]:
    """A colour of a scale, and black or white, whichever is read on it."""
    from plotly.colors import find_intermediate_color, hex_to_rgb

    where = min(max(where, 0), 1)
    (start, low), (end, high) = next(pair for pair in pairwise(scale) if pair[1][0] >= where)
    if "rgba" in low:  # faint, whatever is below it
        return low, "currentColor"
    fraction = round((where - start) / (end - start or 1), 2)
    rgb = find_intermediate_color(hex_to_rgb(low), hex_to_rgb(high), fraction, colortype="tuple")
    light = sum(weight * part for weight, part in zip((0.299, 0.587, 0.114), rgb, strict=True)) > 140
    return "#{:02x}{:02x}{:02x}".format(*map(round, rgb)), "#000" if light else "#fff"


def _text(x: float, y: float, word: str, anchor: str = "middle", *, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(word)}</text>'
