"""A finished run as its folder tells it: files in, and for the eyes what was done to every linear."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from layershare.errors import LayershareError
from layershare.folders import RECIPE
from layershare.foreign import read_text, reading
from layershare.model.arch import part_of
from layershare.plan.edits import Delta
from layershare.report.results import RESULTS, Planned, Results, Speed, read_as

PLAN = "plan.json"
SPEED = "speed.json"
"""What `bench` leaves in a run's folder."""
SHARING = ("share", "anchor", "delta")
"""The kinds of cells that use weights together with others."""
AGAIN = "run its recipe.yaml again with this version of layershare"


@dataclass(frozen=True)
class Cell:
    """What became of one linear: `kind` is dense, own (own factors), share, anchor (its weight is shared), delta (to a
    shared weight), drop, merge, or the name of another edit.

    `layers` are those that share, or go together. `group` numbers the groups of a role in the order of the plan. `kept`
    is the fraction of parameters that is left (`None`: not known), what is shared being split evenly among its users.
    """

    role: str
    layer: int
    kind: str = "dense"
    layers: tuple[int, ...] = ()
    group: int | None = None
    side: str | None = None
    rank: int | None = None
    kept: float | None = 1.0
    error: float | None = None
    spectrum: dict[str, list[float]] | None = None

    @property
    def shares(self) -> bool:
        """Whether it uses weights together with other layers."""
        return self.kind in SHARING


@dataclass(frozen=True)
class Run:
    """The files of a finished run; `name` is how it is called on a page."""

    name: str
    results: dict[str, Any]
    plan: dict[str, Any]
    recipe: str
    speed: dict[str, Any] | None

    @classmethod
    def read(cls, folder: Path, name: str) -> "Run":
        """Read a run's folder. Raises `LayershareError` if it is none, unfinished, damaged or from another version."""
        if not folder.is_dir():
            raise LayershareError(f"There is no folder '{folder}'.")
        for needed in ("config.json", RESULTS, PLAN, RECIPE):
            if not (folder / needed).exists():
                raise LayershareError(
                    f"'{folder}' is no finished run, it has no {needed}; name the output folder of compress or run."
                )
        speed = None
        with reading(f"The {RESULTS} of '{folder}'", AGAIN):
            results = read_as(Results, folder / RESULTS)
        with reading(f"The {PLAN} of '{folder}'", AGAIN):
            plan = read_as(Planned, folder / PLAN)
        with reading(f"The {RECIPE} of '{folder}'", AGAIN):
            recipe = read_text(folder / RECIPE)
        if (folder / SPEED).exists():
            with reading(f"The {SPEED} of '{folder}'", "delete it, or measure it again"):
                speed = read_as(Speed, folder / SPEED)
        return cls(printable(name), results, plan, recipe, speed)

    @property
    def model(self) -> str:
        """The original's name, short."""
        return short(self.results["model"])

    @property
    def kept(self) -> float:
        """The fraction of all parameters that is left."""
        return self.results["after"]["all"]["parameters"] / self.results["before"]["all"]["parameters"]

    @property
    def healing(self) -> dict[str, Any] | None:
        """What `heal` noted, if the model was trained after its compression."""
        return self.results.get("healing")

    @property
    def measured(self) -> dict[str, Any]:
        """What was measured on the model as it lies in the folder: of a healed one, after it was healed."""
        if self.healing is not None:
            return self.healing.get("evaluation", {}).get("after", {})
        return self.results.get("evaluation", {})

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """What was measured on the recipe's test text, if it names one; zero-shot tasks may be in it."""
        return self.measured if "text" in self.measured else None

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """Zero-shot task -> its `model` and `original` results, for those that the recipe names."""
        ours, theirs = self.measured.get("tasks", {}), self.measured.get("original_tasks", {})
        return {task: {"model": ours[task], "original": theirs[task]} for task in ours}

    @property
    def samples(self) -> list[dict[str, str]]:
        """What the model and its original write, if that was tried."""
        return self.results.get("samples", []) if self.healing is None else self.measured.get("samples", [])

    @property
    def ordinary(self) -> bool:
        """Whether the result is an ordinary checkpoint, with no more than whole layers gone or merged."""
        edits = self.plan["edits"]
        return all(e.get("kind") == "merge" or (e.get("kind") == "drop" and e["part"] == "block") for e in edits)

    @property
    def sliced(self) -> bool:
        """Whether hidden states were sliced."""
        return any(edit.get("kind") == "slice" for edit in self.plan["edits"])

    @property
    def roles(self) -> list[str]:
        """Roles in the order in which data flows through a block."""
        return list(self.results["shapes"])

    @property
    def n_layers(self) -> int:
        """Number of the original's layers."""
        return max(len(shapes) for shapes in self.results["shapes"].values())

    @cached_property
    def cells(self) -> dict[tuple[str, int], Cell]:
        """(role, layer) -> what became of that linear, in the order of roles, then layers."""
        cells = {
            (role, layer): Cell(role, layer)
            for role, shapes in self.results["shapes"].items()
            for layer, shape in enumerate(shapes)
            if shape
        }
        counts = dict.fromkeys(self.roles, 0)
        for edit in self.plan["edits"]:
            for cell in self._edited(edit, cells, counts):
                cells[cell.role, cell.layer] = cell
        return cells

    def _edited(self, edit: dict[str, Any], cells: dict[tuple[str, int], Cell], counts: dict[str, int]) -> list[Cell]:
        """The cells that one edit of the plan changes."""
        kind, layers = edit.get("kind", "share"), tuple(edit.get("layers", ()))
        if kind == "share":
            role, rank = edit["role"], edit["rank"]
            facts = self.results["groups"].get(f"{role}.{'-'.join(f'{layer:02d}' for layer in layers)}", {})
            dense = sum(d_in * d_out for d_in, d_out in (self.results["shapes"][role][layer] for layer in layers))
            kept = facts.get("parameters", dense) / dense
            number = counts[role]
            counts[role] += 1
            what = "share" if len(layers) > 1 else "own"
            rest = (what, layers, number, edit["side"], rank, kept, facts.get("error"), facts.get("spectrum"))
            return [Cell(role, layer, *rest) for layer in layers]
        if kind == "delta":
            return self._with_deltas(Delta(**{**edit, "layers": layers}), counts)
        if kind == "drop":
            gone = [(r, layer) for r, layer in cells if layer in layers and edit["part"] in ("block", part_of(r))]
            return [Cell(r, layer, kind, layers, kept=0.0) for r, layer in gone]
        if kind == "merge":
            gone = dict.fromkeys(layers, 0.0) | {edit["into"]: 1.0}
            return [Cell(r, layer, kind, layers, kept=gone[layer]) for r, layer in cells if layer in gone]
        touched = [key for key in cells if edit.get("role", key[0]) == key[0] and (not layers or key[1] in layers)]
        return [Cell(*key, kind, layers, rank=edit.get("rank"), kept=None) for key in touched]

    def _with_deltas(self, edit: Delta, counts: dict[str, int]) -> list[Cell]:
        """The cells of an anchor and of the layers with deltas to it."""
        role, users, number = edit.role, edit.users, counts[edit.role]
        counts[role] += 1
        d_in, d_out = self.results["shapes"][role][edit.anchor]
        base = 1 / len(users)
        kept = base + edit.rank * (d_in + d_out) / (d_in * d_out)
        error = self.results["groups"].get(edit.id, {}).get("error")
        anchor = [Cell(role, edit.anchor, "anchor", users, number, kept=base)] if edit.anchor not in edit.layers else []
        return anchor + [
            Cell(role, layer, edit.kind, users, number, rank=edit.rank, kept=kept, error=error) for layer in edit.layers
        ]


def printable(name: str) -> str:
    """A name in one line, in which every character can be shown and stored."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)


def short(name: str) -> str:
    """A model's name for people: a hub id, or the last part of a path."""
    return printable(Path(name).name or name if Path(name).is_absolute() else name)
