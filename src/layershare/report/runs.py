"""A finished run as its folder tells it: files in, and for the eyes what was done to every linear."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from layershare.errors import LayershareError
from layershare.evaluate.evaluator import Measured
from layershare.evaluate.tasks import TaskResult
from layershare.folders import PLAN, RECIPE
from layershare.foreign import read_text, reading
from layershare.manifest import require_whole
from layershare.model.arch import part_of
from layershare.model.composition import Member
from layershare.plan.edits import Delta, Drop, Edit, Merge, Place, Share, Slice, composed, quantized, sliced_width
from layershare.plan.plan import parse_plan
from layershare.report.results import RESULTS, Healed, Results, Solved, Spectrum, Speed, read_as

SPEED = "speed.json"
"""What `bench` leaves in a run's folder."""
SHARING = ("share", "anchor", "delta")
"""The kinds of cells that use weights together with others."""
AGAIN = "run its recipe.yaml again with this version of layershare"


@dataclass(frozen=True)
class Cell:
    """What became of one linear: `kind` is dense, own (own factors), share, anchor (its weight is shared), delta (to a
    shared weight), drop, merge or slice.

    `places` are those that share; `layers`, those that share or go together. `group` numbers the groups of a role in
    the order of the plan; of several roles, those of the first. `kept` is the fraction of parameters that is left
    (`None`: not known), what is shared being split evenly among its users. `bits`: of a number, where it is stored as
    integers by plan.
    """

    role: str
    layer: int
    kind: str = "dense"
    layers: tuple[int, ...] = ()
    places: tuple[Place, ...] = ()
    group: int | None = None
    side: str | None = None
    rank: int | None = None
    kept: float | None = 1.0
    error: float | None = None
    spectrum: Spectrum | None = None
    bits: int | None = None

    @property
    def shares(self) -> bool:
        """Whether it uses weights together with other linears."""
        return self.kind in SHARING

    @property
    def together(self) -> str:
        """What shares or goes together, in words: `layers 2, 3`, `gate and up of layer 2`."""
        roles = list(dict.fromkeys(place.role for place in self.places))
        layers = in_layers(self.layers)
        return f"{', '.join(roles[:-1])} and {roles[-1]} of {layers}" if len(roles) > 1 else layers


@dataclass(frozen=True)
class Run:
    """The files of a finished run; `name` is how it is called on a page."""

    name: str
    results: Results
    edits: tuple[Edit, ...]
    recipe: str
    speed: Speed | None

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
        require_whole(folder, weights=False)
        speed = None
        with reading(f"The {RESULTS} of '{folder}'", AGAIN):
            results = read_as(Results, folder / RESULTS)
        with reading(f"The {PLAN} of '{folder}'", AGAIN):
            edits = parse_plan(read_text(folder / PLAN)).edits
        with reading(f"The {RECIPE} of '{folder}'", AGAIN):
            recipe = read_text(folder / RECIPE)
        if (folder / SPEED).exists():
            with reading(f"The {SPEED} of '{folder}'", "delete it, or measure it again"):
                speed = read_as(Speed, folder / SPEED)
        return cls(printable(name), results, edits, recipe, speed)

    @property
    def model(self) -> str:
        """The original's name, short."""
        return short(self.results.model)

    @property
    def kept(self) -> float:
        """The fraction of all parameters that is left; of bytes, where matrices are stored as integers."""
        before, after = self.results.before.all, self.results.after.all
        return after.bytes / before.bytes if self.integers else after.parameters / before.parameters

    @property
    def integers(self) -> bool:
        """Whether matrices are stored as integers."""
        return self.results.quantization is not None or bool(quantized(self.edits))

    @property
    def healing(self) -> Healed | None:
        """What `heal` noted, if the model was trained after its compression."""
        return self.results.healing

    @property
    def evaluation(self) -> Measured | None:
        """What was measured on the recipe's test text, if it names one; zero-shot tasks may be in it."""
        return self.results.measured if self.results.measured.text else None

    @property
    def tasks(self) -> dict[str, tuple[TaskResult, TaskResult]]:
        """Zero-shot task -> what the model and the original reached, for those that the recipe names."""
        ours, theirs = self.results.measured.tasks or {}, self.results.measured.original_tasks or {}
        return {task: (ours[task], theirs[task]) for task in ours}

    @property
    def samples(self) -> list[dict[str, str]]:
        """What the model and its original write, if that was tried."""
        return (self.results if self.healing is None else self.results.measured).samples or []

    @property
    def ordinary(self) -> bool:
        """Whether the result is an ordinary checkpoint, with no more than whole layers gone or merged."""
        whole = all(isinstance(e, Merge) or (isinstance(e, Drop) and e.part == "block") for e in self.edits)
        return whole and self.results.quantization is None

    @property
    def sliced(self) -> bool:
        """Whether hidden states were sliced."""
        return sliced_width(self.edits) is not None

    @property
    def roles(self) -> list[str]:
        """Roles in the order in which data flows through a block."""
        return list(self.results.shapes)

    @property
    def n_layers(self) -> int:
        """Number of the original's layers."""
        return max(len(shapes) for shapes in self.results.shapes.values())

    @cached_property
    def cells(self) -> dict[tuple[str, int], Cell]:
        """(role, layer) -> what became of that linear, in the order of roles, then layers."""
        cells = {
            (role, layer): Cell(role, layer)
            for role, shapes in self.results.shapes.items()
            for layer, shape in enumerate(shapes)
            if shape
        }
        counts = dict.fromkeys(self.roles, 0)
        for edit in self.edits:
            for cell in self._edited(edit, cells, counts):
                cells[cell.role, cell.layer] = cell
        stored = {place: edit.bits for place, edit in quantized(self.edits).items() if place in cells}
        return cells | {place: replace(cells[place], bits=bits) for place, bits in stored.items()}

    def _edited(self, edit: Edit, cells: dict[tuple[str, int], Cell], counts: dict[str, int]) -> list[Cell]:
        """The cells that one edit of the plan changes."""
        if isinstance(edit, Share | Delta):
            return self._composed(edit, counts)
        if isinstance(edit, Drop):
            gone = [(r, layer) for r, layer in cells if layer in edit.layers and edit.part in ("block", part_of(r))]
            return [Cell(r, layer, edit.kind, edit.layers, kept=0.0) for r, layer in gone]
        if isinstance(edit, Merge):
            left = dict.fromkeys(edit.layers, 0.0) | {edit.into: 1.0}
            return [Cell(r, layer, edit.kind, edit.layers, kept=left[layer]) for r, layer in cells if layer in left]
        return [Cell(*place, edit.kind, kept=None) for place in cells] if isinstance(edit, Slice) else []

    def _composed(self, edit: Share | Delta, counts: dict[str, int]) -> list[Cell]:
        """The cells of linears that an edit factors or lets share."""
        places, number = edit.places, counts[edit.roles[0]]
        counts[edit.roles[0]] += 1
        members: dict[Place, Member] = {}
        for place in places:
            if (shape := self.results.shapes[place.role][place.layer]) is None:
                raise ValueError(f"there is no {place}")
            members[place] = Member(str(place), *shape)
        composition, facts = composed(edit, members), self.results.groups.get(edit.id, Solved())
        side, private = (edit.side, edit.private_rank) if isinstance(edit, Share) else (None, 0)
        layers = tuple(dict.fromkeys(place.layer for place in places))
        cells = []
        for place, member in members.items():
            products = any(len(term.factors) > 1 for term in composition.terms_of(member.name))
            what: Any = {"error": facts.error, "spectrum": facts.spectrum} if products else {}
            rank = edit.rank + private if products else None
            kind = edit.kind if products and len(places) > 1 else "anchor" if len(places) > 1 else "own"
            kept = composition.parameters_of(member) / (member.d_in * member.d_out)
            cells.append(Cell(*place, kind, layers, places, number, side=side, rank=rank, kept=kept, **what))
        return cells


def in_layers(layers: Sequence[int]) -> str:
    """Layers by their numbers: `layer 2`, `layers 2, 3`."""
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"


def printable(name: str) -> str:
    """A name in one line, in which every character can be shown and stored."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)


def short(name: str) -> str:
    """A model's name for people: a hub id, or the last part of a path."""
    return printable(Path(name).name or name if Path(name).is_absolute() else name)
