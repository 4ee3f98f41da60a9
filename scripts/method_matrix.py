"""The table of methods × families: what works, and why the rest is refused. `tests/test_matrix.py` runs every cell."""

from benchmarks.methods.tables import markdown
from layershare import Spec, describe
from layershare.errors import UnsupportedModelError
from layershare.methods import METHODS, make_method
from layershare.plan.budget import allowed, parse_keep
from tests.families import CONFIGS, OPTIONS

WORKS = "works"


def matrix() -> str:
    """A row per method, a column per set of families that all methods treat alike, and below it the reasons."""
    columns = {family: _column(family) for family in CONFIGS}
    sets: dict[tuple[str, ...], list[str]] = {}
    for family, column in columns.items():
        sets.setdefault(tuple(column), []).append(family)
    reasons = list(dict.fromkeys(cell for column in sets for cell in column if cell != WORKS))
    marks = {WORKS: WORKS, **{reason: f"refused ({number})" for number, reason in enumerate(reasons, 1)}}
    rows = [[f"`{name}`", *(marks[column[i]] for column in sets)] for i, name in enumerate(METHODS)]
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return f"{markdown(['', *(', '.join(families) for families in sets.values())], rows)}\n\n{notes}"


def _column(family: str) -> list[str]:
    """What every method says to one family, as a tiny model."""
    spec = describe(CONFIGS[family]())
    return [_cell(name, spec).replace(f"'{family}'", "…") for name in METHODS]


def _cell(method: str, spec: Spec) -> str:
    try:
        make_method(method, OPTIONS.get(method)).require(spec, allowed(spec, parse_keep(0.85), "targets"))
    except UnsupportedModelError as reason:
        return str(reason)
    return WORKS
