"""What will be done to a model: an ordered list of edits with exact sizes, printable and editable."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from layershare.errors import LayershareError
from layershare.model.arch import Spec
from layershare.plan.budget import Sizes, measure

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Share:
    """Layers that share one basis of rank k for one role; a single layer is plain low rank.

    `side="input"`: Wᵢ ≈ B Cᵢ with B: d_in × k shared. `side="output"`: Wᵢ ≈ Aᵢ B with B: k × d_out shared.
    """

    role: str
    layers: tuple[int, ...]
    rank: int
    side: Side

    @property
    def id(self) -> str:
        """A name for files and tables: `q.00-01`."""
        return f"{self.role}.{'-'.join(f'{layer:02d}' for layer in self.layers)}"


@dataclass(frozen=True)
class Plan:
    """The edits that make a model smaller, and its exact sizes before and after."""

    model_type: str
    method: str
    options: dict[str, Any]
    keep: float | str
    of: str
    before: Sizes
    after: Sizes
    edits: tuple[Share, ...]

    def to_json(self) -> str:
        """The plan as JSON, as stored in `plan.json`."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan. Raises `LayershareError` if the text is not one."""
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise LayershareError(f"This is not a plan: {place or 'the text'}: {first['msg']}.") from error

    @classmethod
    def read(cls, path: str | Path, spec: Spec) -> "Plan":
        """Read a plan that may have been edited by hand, check it against the model and measure it again.

        Raises `LayershareError` if the file is missing, is no plan, or does not fit the model.
        """
        try:
            plan = cls.from_json(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise LayershareError(f"There is no plan at '{path}'.") from error
        check(spec, plan.edits)
        return replace(plan, before=measure(spec, ()), after=measure(spec, plan.edits))


def check(spec: Spec, edits: Sequence[Share]) -> None:
    """Raise `LayershareError` if the edits do not fit the model or each other."""
    seen: set[tuple[str, int]] = set()
    for edit in edits:
        if not edit.layers:
            raise LayershareError(f"The plan has a group of {edit.role} with no layers; give it some or delete it.")
        for layer in edit.layers:
            where = f"{edit.role} of layer {layer}"
            try:
                linear = spec.linear(edit.role, layer)
            except KeyError as error:
                raise LayershareError(f"The plan names {where}, which this model does not have.") from error
            if (edit.role, layer) in seen:
                raise LayershareError(f"The plan names {where} twice; each linear can belong to one group only.")
            seen.add((edit.role, layer))
            first = spec.linear(edit.role, edit.layers[0])
            if (linear.d_in, linear.d_out) != (first.d_in, first.d_out):
                raise LayershareError(f"The plan shares {where} with a layer of another shape.")
            if not 1 <= edit.rank <= min(linear.d_in, linear.d_out * len(edit.layers)):
                raise LayershareError(f"The plan gives {where} rank {edit.rank}, which its shape does not allow.")
