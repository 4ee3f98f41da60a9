"""What can be done to a model: the edits, and whether they fit it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from layershare.errors import LayershareError
from layershare.model.arch import Spec

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
            shared, private = (linear.d_in, linear.d_out) if edit.side == "input" else (linear.d_out, linear.d_in)
            if not 1 <= edit.rank <= min(shared, private * len(edit.layers)):
                raise LayershareError(f"The plan gives {where} rank {edit.rank}, which its shape does not allow.")
