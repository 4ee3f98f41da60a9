"""What will be done to a model: an ordered list of edits with exact sizes, printable and editable."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from layershare.errors import LayershareError
from layershare.model.arch import Spec
from layershare.plan.budget import Sizes, measure
from layershare.plan.edits import Edit, check


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
    edits: tuple[Edit, ...]

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
    def from_file(cls, path: str | Path) -> "Plan":
        """Read a plan as it stands in a file. Raises `LayershareError` if the file is missing or is no plan."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise LayershareError(f"There is no plan that can be read at '{path}'.") from error

    @classmethod
    def read(cls, path: str | Path, spec: Spec) -> "Plan":
        """Read a plan that may have been edited by hand, check it against the model and measure it again.

        Raises `LayershareError` if the file is missing, is no plan, or does not fit the model.
        """
        plan = cls.from_file(path)
        check(spec, plan.edits)
        return replace(plan, before=measure(spec, ()), after=measure(spec, plan.edits))
