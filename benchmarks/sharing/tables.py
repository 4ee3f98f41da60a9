"""Tables of the experiments in benchmarks/sharing, for docs/sharing.md."""

from collections.abc import Iterable, Iterator
from math import sqrt
from statistics import fmean, median, stdev
from typing import Any

from benchmarks.methods.tables import machine, markdown, require_same
from benchmarks.results import Results
from layershare.model.arch import ROLES

Values = dict[str, Any]
UNMEASURED = "Not measured yet; `python -m benchmarks.sharing.run` does it."
WAYS = {
    "shared": "one basis",
    "hybrid": "and private directions",
    "free hybrid": "the same, stored better",
    "bound": "if the layers' spaces were one",
    "plain": "one basis, nothing pivoted",
}
"""The ways of sharing by their names in the results and in the tables; `shared` is the best that was found."""
STEPS = {"solved": "as solved", "refit": "after refitting", "refine": "after block-wise training"}


def sharing_map(every: Results, model: str) -> str:
    """The part of the parameters that one basis saves at equal predicted loss, by role, size and shape of window."""
    rows = _rows(every, model)
    if not rows:
        return UNMEASURED
    asked = {(each["experiment"]["layers"], each["experiment"]["distance"]) for each in rows.values()}
    shapes = [shape for shape in sorted(asked) if any(True for _ in _of(rows, None, shape))]
    header = ["removed", "matrix", *(_shape_name(*shape) for shape in shapes)]
    body = []
    for keep in _keeps(rows):
        for role in _roles(rows):
            cells = [_cell([_saved(window[keep], "shared") for window in _of(rows, role, shape)]) for shape in shapes]
            body.append([_removed(keep), f"`{role}`", *cells])
    first = next(iter(rows.values()))
    text = first["experiment"]["texts"]["calibration"]
    note = (
        f"{model}; statistics of {text['source']}, {text['blocks']} blocks of {text['length']} tokens. {machine(first)}"
    )
    return f"{markdown(header, body)}\n\n{note}"


def sharing_ways(every: Results, model: str) -> str:
    """The same for pairs of adjacent layers, by way of sharing."""
    rows = _rows(every, model)
    if not rows:
        return UNMEASURED
    body = []
    for keep in _keeps(rows):
        for role in _roles(rows):
            windows = list(_of(rows, role, (2, 1)))
            cells = [_cell([_saved(window[keep], way) for window in windows]) for way in WAYS]
            body.append([_removed(keep), f"`{role}`", *cells])
    return markdown(["removed", "matrix", *WAYS.values()], body)


def sharing_plans(every: Results, model: str) -> str:
    """KL of whole plans that share, against the plan of the same size that does not, and what those share by choice."""
    plans = {name.split("/", 2)[2]: each for name, each in every.read().items() if name.startswith(f"{model}/plan/")}
    if not plans:
        return UNMEASURED
    _require_comparable(model, plans.values())
    keeps = sorted({each["experiment"]["keep"] for each in plans.values()}, reverse=True)
    tables = []
    for keep in keeps:
        private = plans[f"{keep}-private"]["found"]
        steps = [step for step in STEPS if step in private["kl"]]
        body = []
        for name in dict.fromkeys(name.partition("-")[2] for name in plans):
            if (plan := plans.get(f"{keep}-{name}")) is None or name == "private":
                continue
            found = plan["found"]
            change = found["predicted"] / private["predicted"] - 1
            cells = [_change(found["kl"].get(step), private["kl"][step]) for step in steps]
            body.append([name, str(len(found["groups"])), f"{change:+.1%}", *cells])
        if not body:
            continue
        own = " · ".join(f"{fmean(private['kl'][step]):.4f} {STEPS[step]}" for step in steps)
        header = [f"{_removed(str(keep))} removed", "groups", "predicted", *(f"KL {STEPS[step]}" for step in steps)]
        title = f"Nothing shared: KL {own} (predicted {private['predicted']:.4f})"
        tables.append(f"{title}:\n\n{markdown(header, body)}")
        for name in (each.partition("-")[2] for each in plans if each.startswith(f"{keep}-offered")):
            groups = plans[f"{keep}-{name}"]["found"]["groups"]
            tables.append(f"*{name}* shares {', '.join(f'`{group}`' for group in groups) or 'nothing'}.")
    first = next(iter(plans.values()))
    text = first["experiment"]["texts"]["test"]
    note = f"{model}, on {text['blocks']} other blocks of {text['length']} tokens of {text['source']}. {machine(first)}"
    return "\n\n".join([*tables, note])


def _rows(every: Results, model: str) -> dict[str, Values]:
    rows = {name: each for name, each in every.read().items() if name.startswith(f"{model}/map/")}
    _require_comparable(model, rows.values())
    return rows


def _require_comparable(model: str, results: Iterable[Values]) -> None:
    identities = [each["experiment"] for each in results]
    require_same(
        model,
        "`python -m benchmarks.sharing.run`",
        {
            "weights": {each["model_fingerprint"] for each in identities},
            "texts": {tuple(text["tokens_sha256"] for text in each["texts"].values()) for each in identities},
        },
    )


def _of(rows: dict[str, Values], role: str | None, shape: tuple[int, int]) -> Iterator[Values]:
    """The windows of a role, or of all, of one shape."""
    for each in rows.values():
        asked = each["experiment"]
        if role in (None, asked["role"]) and (asked["layers"], asked["distance"]) == shape:
            yield from each["found"]


def _roles(rows: dict[str, Values]) -> list[str]:
    present = {each["experiment"]["role"] for each in rows.values()}
    return [role for role in ROLES if role in present]


def _keeps(rows: dict[str, Values]) -> list[str]:
    return [str(keep) for keep in next(iter(rows.values()))["experiment"]["keeps"]]


def _removed(keep: str) -> str:
    return f"{1 - float(keep):.0%}"


def _shape_name(layers: int, distance: int) -> str:
    if layers == 2 and distance > 1:
        return f"2 layers, {distance} apart"
    return f"{layers} adjacent"


def _saved(found: Values, way: str) -> float:
    """The best that was found where a way has several; a shared basis that was not improved is the pooled one."""
    return max(found[name][2] for name in ({"shared", "pooled"} if way == "shared" else {way}) & found.keys())


def _cell(saved: list[float]) -> str:
    """Median, least and most."""
    if not saved:
        return ""
    return f"{median(saved):+.1%} ({min(saved):+.1%} to {max(saved):+.1%})"


def _change(ours: list[float] | None, private: list[float]) -> str:
    """By how much KL differs from that of private bases, with the standard error over blocks of text, paired."""
    if ours is None:
        return ""
    apart = [a - b for a, b in zip(ours, private, strict=True)]
    mean = fmean(private)
    error = stdev(apart) / sqrt(len(apart))
    return f"{fmean(apart) / mean:+.1%} ± {error / mean:.1%}"
