"""What will be done to a model: an ordered list of edits with exact sizes, printable and editable."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import FailFast, Field, ValidationError

from layershare.errors import LayershareError
from layershare.foreign import parse_json, read_text, reading
from layershare.model.arch import Spec
from layershare.plan.budget import Sizes, measure, parse_keep
from layershare.plan.edits import Edit, check, in_floats, quantized
from layershare.values import STRICT, Counted, Dial, Word, checked, first_fault


@dataclass(frozen=True)
class Plan:
    """The edits that make a model smaller, and its exact sizes before and after."""

    __pydantic_config__ = STRICT
    model_type: Word
    method: Word
    options: dict[Word, Any]
    keep: Dial
    of: Counted
    before: Sizes
    after: Sizes
    edits: Annotated[tuple[Edit, ...], FailFast(), Field(max_length=100_000)]
    predicted_loss: Annotated[float, Field(ge=0)] | None = None
    """By how much the method predicts the edits to raise the loss, in nats per token, where it has an idea of it."""
    expected_kl: Annotated[float, Field(ge=0)] | None = None
    """The KL divergence from the original, in nats per token, that this prediction means, where plans were measured."""

    @property
    def in_floats(self) -> "Plan":
        """Without what says how matrices are stored; its sizes are this plan's still."""
        return replace(self, edits=in_floats(self.edits))

    def to_json(self) -> str:
        """The plan as JSON, as stored in `plan.json`."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan. Raises `LayershareError` if the text is not one."""
        with reading("The plan", "mend it, or let `layershare plan` write one"):
            return parse_plan(text)

    @classmethod
    def from_file(cls, path: str | Path) -> "Plan":
        """Read a plan as it stands in a file. Raises `LayershareError` if the file is missing or is no plan."""
        with reading(f"The plan '{path}'", "mend it, name another file, or let `layershare plan` write one"):
            return parse_plan(read_text(Path(path)))

    @classmethod
    def read(cls, path: str | Path, spec: Spec) -> "Plan":
        """Read a plan that may have been edited by hand, check it against the model and measure it again.

        Raises `LayershareError` if the file is missing, is no plan, or does not fit the model.
        """
        plan = cls.from_file(path)
        if plan.model_type != spec.model_type:
            raise LayershareError(
                f"The plan '{path}' is for a '{plan.model_type}' model, this is a '{spec.model_type}'; make another."
            )
        check(spec, plan.edits)
        measured = replace(plan, before=measure(spec, ()), after=measure(spec, plan.edits))
        told, found = plan.after.all, measured.after.all
        if not quantized(plan.edits):  # the same edits may be stored in another type
            told = replace(told, bytes=found.bytes)
        # What is foretold is of the edits as they were.
        return measured if found == told else replace(measured, predicted_loss=None, expected_kl=None)


def parse_plan(text: str) -> Plan:
    """The plan that a JSON text is. Raises `ValueError` if it is none; see `foreign.reading`."""
    try:
        plan = checked(Plan, parse_json(text))
    except ValidationError as error:
        path, said, _ = first_fault(error)
        raise ValueError(f"it is not a plan: {'.'.join(path) or 'the text'}: {said}") from error
    parse_keep(plan.keep)
    return plan
