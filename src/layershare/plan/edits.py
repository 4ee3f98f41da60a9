"""What can be done to a model: the edits, and whether they fit it and each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field

from layershare.errors import LayershareError, unknown
from layershare.model.arch import PARTS, Linear, Part, Spec
from layershare.values import STRICT, Number, Whole, Word

Side = Literal["input", "output"]
Layers = Annotated[tuple[Whole, ...], FailFast(), Field(max_length=100_000)]


@dataclass(frozen=True)
class Share:
    """Layers that share one basis of rank k for one role; a single layer is plain low rank.

    `side="input"`: Wᵢ ≈ B Cᵢ with B: d_in × k shared. `side="output"`: Wᵢ ≈ Aᵢ B with B: k × d_out shared.
    """

    __pydantic_config__ = STRICT
    role: Word
    layers: Layers
    rank: Whole
    side: Side
    kind: Literal["share"] = "share"

    @property
    def id(self) -> str:
        """A name for files and tables: `q.00-01`."""
        return f"{self.role}.{'-'.join(f'{layer:02d}' for layer in self.layers)}"

    @property
    def users(self) -> tuple[int, ...]:
        """All layers that use the shared basis."""
        return self.layers


@dataclass(frozen=True)
class Delta:
    """Layers that use the weight of an anchor layer, each with a low-rank delta of its own: Wₜ ≈ W + AₜBₜ.

    W: d_in × d_out is stored once, at the anchor; Aₜ: d_in × r, Bₜ: r × d_out for every t of `layers`. The anchor's own
    weight is W, unless it is one of `layers`: then it has a delta, too, and W is nobody's own (a mean).
    """

    __pydantic_config__ = STRICT
    role: Word
    anchor: Whole
    layers: Layers
    rank: Whole
    kind: Literal["delta"] = "delta"

    @property
    def id(self) -> str:
        """A name for files and tables, the anchor first: `up.02+03-04`."""
        return f"{self.role}.{self.anchor:02d}+{'-'.join(f'{layer:02d}' for layer in self.layers)}"

    @property
    def users(self) -> tuple[int, ...]:
        """All layers that use the shared weight, the anchor among them."""
        return self.layers if self.anchor in self.layers else (self.anchor, *self.layers)


@dataclass(frozen=True)
class Drop:
    """Layers that lose a part: their attention, their MLP (what is left passes the residual on), or the whole block."""

    __pydantic_config__ = STRICT
    part: Part
    layers: Layers
    kind: Literal["drop"] = "drop"


@dataclass(frozen=True)
class Merge:
    """One block in place of several: every tensor of block `into` becomes Σ cⱼ Tⱼ over `layers`; the others go.

    `layers` are in order and hold `into`; `coefficients` are their cⱼ.
    """

    __pydantic_config__ = STRICT
    into: Whole
    layers: Layers
    coefficients: tuple[Annotated[Number, Field(ge=-1e6, le=1e6)], ...]
    kind: Literal["merge"] = "merge"


@dataclass(frozen=True)
class Slice:
    """Hidden states of `width` principal components in place of all: every matrix that reads or writes them shrinks.

    Each sub-layer gets a width × width shortcut matrix, which turns the residual into the next one's components.
    """

    __pydantic_config__ = STRICT
    width: Whole
    kind: Literal["slice"] = "slice"


def _of_a_kind(values: Any) -> Any:
    """An edit that does not say its kind has that of which it has the keys."""
    if not isinstance(values, dict):
        return values
    own = {"anchor": "delta", "part": "drop", "into": "merge", "width": "slice"}
    return {"kind": next((own[key] for key in own if key in values), "share"), **values}


Edit = Annotated[
    Annotated[Share | Delta | Drop | Merge | Slice, Field(discriminator="kind")], BeforeValidator(_of_a_kind)
]


def sliced_width(edits: Sequence[Edit]) -> int | None:
    """The width that the hidden states are sliced to, `None` if they are not."""
    return next((edit.width for edit in edits if isinstance(edit, Slice)), None)


def sharing(edits: Sequence[Edit]) -> dict[tuple[str, int], Share | Delta]:
    """(role, layer) -> the edit that replaces that linear's weight by something that it shares."""
    found: dict[tuple[str, int], Share | Delta] = {}
    for edit in edits:
        if isinstance(edit, Share | Delta):
            found.update(dict.fromkeys(((edit.role, layer) for layer in edit.users), edit))
    return found


def widths(linear: Linear, side: Side) -> tuple[int, int]:
    """The width of the shared side and that of the private one: d_in and d_out, or the other way round."""
    return (linear.d_in, linear.d_out) if side == "input" else (linear.d_out, linear.d_in)


def kept_layers(n_layers: int, edits: Sequence[Edit]) -> list[int]:
    """The blocks that are left, by their old numbers, in order."""
    gone: set[int] = set()
    for edit in edits:
        if isinstance(edit, Drop) and edit.part == "block":
            gone.update(edit.layers)
        elif isinstance(edit, Merge):
            gone.update(set(edit.layers) - {edit.into})
    return [layer for layer in range(n_layers) if layer not in gone]


def dropped_parts(edits: Sequence[Edit]) -> list[tuple[int, Part]]:
    """The (layer, part) pairs that layers lose, in order of layers; whole blocks are not among them."""
    return sorted(
        (layer, edit.part) for edit in edits if isinstance(edit, Drop) and edit.part != "block" for layer in edit.layers
    )


def check(spec: Spec, edits: Sequence[Edit]) -> None:
    """Raise `LayershareError` if the edits do not fit the model or each other."""
    if any(isinstance(edit, Slice) for edit in edits):
        _check_slice(spec, edits)
        return
    seen: set[tuple[str, int]] = set()
    for edit in edits:
        assert not isinstance(edit, Slice)
        if not edit.layers:
            raise LayershareError(f"The plan has a {edit.kind} of no layers; give it some or delete it.")
        for layer in edit.users if isinstance(edit, Share | Delta) else edit.layers:
            if not 0 <= layer < spec.n_layers:
                what = f"{edit.role} of layer {layer}" if isinstance(edit, Share | Delta) else f"layer {layer}"
                raise LayershareError(f"The plan names {what}, which this model does not have.")
        if isinstance(edit, Share):
            _check_share(spec, edit)
        elif isinstance(edit, Delta):
            _check_delta(spec, edit)
        elif isinstance(edit, Drop):
            if edit.part not in (*PARTS, "block"):
                raise unknown("part", edit.part, (*PARTS, "block"))
        else:
            _check_merge(edit)
        for claim in _claims(spec, edit):
            if claim in seen:
                raise LayershareError(f"The plan names {claim[0]} of layer {claim[1]} twice; one edit can have it.")
            seen.add(claim)
    kept = kept_layers(spec.n_layers, edits)
    if not kept:
        raise LayershareError("The plan leaves no layer of the model; keep at least one.")
    if len(kept) < spec.n_layers and sharing(edits):
        raise LayershareError("A plan that removes whole layers cannot share weights as well; compress in two steps.")


def _check_slice(spec: Spec, edits: Sequence[Edit]) -> None:
    dense = spec.sliceable().width
    if len(edits) > 1:
        raise LayershareError("A plan that slices can have no other edits; compress in two steps.")
    width = sliced_width(edits)
    if width is None or not 1 <= width <= dense:
        raise LayershareError(f"The plan slices to width {width}; this model's hidden states have {dense}.")


def _claims(spec: Spec, edit: Share | Delta | Drop | Merge) -> list[tuple[str, int]]:
    """The (role, layer) pairs that an edit changes."""
    if isinstance(edit, Share | Delta):
        return [(edit.role, layer) for layer in edit.users]
    parts = (edit.part,) if isinstance(edit, Drop) and edit.part != "block" else PARTS
    return [(linear.role, layer) for layer in edit.layers for part in parts for linear in spec.part(layer, part)]


def _check_merge(edit: Merge) -> None:
    if edit.into not in edit.layers or len(edit.coefficients) != len(edit.layers):
        raise LayershareError(
            f"The merge into layer {edit.into} must list that layer and one coefficient for each of its layers."
        )


def _check_share(spec: Spec, edit: Share) -> None:
    linear = _check_alike(spec, edit.role, edit.layers)
    shared, private = widths(linear, edit.side)
    _check_rank(edit, edit.layers[0], min(shared, private * len(edit.layers)))


def _check_delta(spec: Spec, edit: Delta) -> None:
    if edit.layers == (edit.anchor,):
        raise LayershareError(
            f"The plan gives {edit.role} of layer {edit.anchor} a delta to its own weight alone; name other layers."
        )
    linear = _check_alike(spec, edit.role, edit.users)
    _check_rank(edit, edit.layers[0], min(linear.d_in, linear.d_out))


def _check_alike(spec: Spec, role: str, layers: Sequence[int]) -> Linear:
    """The first of the linears that share. Raises if the model lacks one, or if they differ in shape."""
    linears: list[Linear] = []
    for layer in layers:
        where = f"{role} of layer {layer}"
        try:
            linears.append(spec.linear(role, layer))
        except KeyError as error:
            raise LayershareError(f"The plan names {where}, which this model does not have.") from error
        if (linears[-1].d_in, linears[-1].d_out) != (linears[0].d_in, linears[0].d_out):
            raise LayershareError(f"The plan shares {where} with a layer of another shape.")
    return linears[0]


def _check_rank(edit: Share | Delta, layer: int, limit: int) -> None:
    if not 1 <= edit.rank <= limit:
        raise LayershareError(
            f"The plan gives {edit.role} of layer {layer} rank {edit.rank}, which its shape does not allow."
        )
