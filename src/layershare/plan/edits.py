"""What can be done to a model: the edits, and whether they fit it and each other."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, FailFast, Field

from layershare.errors import LayershareError, unknown
from layershare.model.arch import PARTS, Part, Spec
from layershare.model.composition import Composition, Member, Side, Storage, alone, deltas, shared
from layershare.values import STRICT, Flag, Number, Scheme, Whole, Word

_MOST_LAYERS = 100_000
Layers = Annotated[tuple[Whole, ...], FailFast(), Field(max_length=_MOST_LAYERS)]


class Place(NamedTuple):
    """Where a linear is: its role, and the number of its block."""

    role: Word
    layer: Whole


def places(role: str, layers: Iterable[int]) -> tuple[Place, ...]:
    """The linears of one role in some layers."""
    return tuple(Place(role, layer) for layer in layers)


@dataclass(frozen=True)
class Share:
    """Linears that share one basis of rank k: those of a role in several layers, of several roles in one, or both.

    `side="input"`: Wᵢ ≈ B Cᵢ with B: d_in × k shared. `side="output"`: Wᵢ ≈ Aᵢ B with B: k × d_out shared. A place
    alone is plain low rank. `private_rank` r: each has r directions of its own beside, Wᵢ ≈ B Cᵢ + Dᵢ Eᵢ. `pivot`: B in
    pivoted form, which has k² numbers less.
    """

    __pydantic_config__ = STRICT
    places: Annotated[tuple[Place, ...], FailFast(), Field(max_length=_MOST_LAYERS)]
    rank: Whole
    side: Side
    private_rank: Annotated[Whole, Field(ge=0)] = 0
    pivot: Flag = False
    kind: Literal["share"] = "share"

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of its places, each once."""
        return tuple(dict.fromkeys(place.role for place in self.places))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of its places, each once."""
        return tuple(dict.fromkeys(place.layer for place in self.places))

    @property
    def id(self) -> str:
        """A name for files and tables: `q.00-01`, `gate+up.03`."""
        if set(self.places) == set(product(self.roles, self.layers)):
            return f"{'+'.join(self.roles)}.{_numbers(self.layers)}"
        return "+".join(f"{role}.{layer:02d}" for role, layer in self.places)


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
        return f"{self.role}.{self.anchor:02d}+{_numbers(self.layers)}"

    @property
    def roles(self) -> tuple[str, ...]:
        """Its role."""
        return (self.role,)

    @property
    def places(self) -> tuple[Place, ...]:
        """All linears that use the shared weight, the anchor's among them."""
        return places(self.role, self.layers if self.anchor in self.layers else (self.anchor, *self.layers))


def _numbers(layers: Iterable[int]) -> str:
    return "-".join(f"{layer:02d}" for layer in layers)


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


@dataclass(frozen=True)
class Quantize:
    """The matrices at these places, or the factors that stand there, stored with `bits` a number.

    With a scale for each `group` of them along the input, see `Storage`; bases have `basis_bits`. `scheme`: what the
    numbers are.
    """

    __pydantic_config__ = STRICT
    places: Annotated[tuple[Place, ...], FailFast(), Field(max_length=_MOST_LAYERS)]
    bits: Whole
    basis_bits: Whole
    group: Whole = 64
    scheme: Scheme = "int"
    kind: Literal["quantize"] = "quantize"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of its places, each once."""
        return tuple(dict.fromkeys(place.layer for place in self.places))

    def of(self, composition: Composition) -> Composition:
        """What stands at its places, with its factors stored so. Raises `LayershareError` as `Storage`."""
        return composition.stored_as(*Storage.pair(self.bits, self.basis_bits, self.group, self.scheme))


def _of_a_kind(values: Any) -> Any:
    """An edit that does not say its kind has that of which it has the keys."""
    if not isinstance(values, dict):
        return values
    own = {"anchor": "delta", "part": "drop", "into": "merge", "width": "slice", "bits": "quantize"}
    return {"kind": next((own[key] for key in own if key in values), "share"), **values}


Edit = Annotated[
    Annotated[Share | Delta | Drop | Merge | Slice | Quantize, Field(discriminator="kind")], BeforeValidator(_of_a_kind)
]


def sliced_width(edits: Sequence[Edit]) -> int | None:
    """The width that the hidden states are sliced to, `None` if they are not."""
    return next((edit.width for edit in edits if isinstance(edit, Slice)), None)


def sharing(edits: Sequence[Edit]) -> dict[Place, Share | Delta]:
    """Place -> the edit that replaces that linear's weight by something that it shares."""
    found: dict[Place, Share | Delta] = {}
    for edit in edits:
        if isinstance(edit, Share | Delta):
            found.update(dict.fromkeys(edit.places, edit))
    return found


def quantized(edits: Sequence[Edit]) -> dict[Place, Quantize]:
    """Place -> the edit that says as what integers it is stored."""
    return {place: edit for edit in edits if isinstance(edit, Quantize) for place in edit.places}


def in_floats(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """The edits that make the matrices, without those that say how they are stored."""
    return tuple(edit for edit in edits if not isinstance(edit, Quantize))


def composition(spec: Spec, edit: Share | Delta) -> Composition:
    """What stands in the place of the linears of an edit.

    Raises `LayershareError` if the model lacks one of them, or if they cannot share.
    """
    for place in edit.places:
        _require_place(spec, place)
    return composed(edit, {place: spec.by_place[place].member for place in edit.places})


def composed(edit: Share | Delta, members: Mapping[Place, Member]) -> Composition:
    """The same, of the members by their places; see `composition`."""
    if isinstance(edit, Share):
        own = [members[place] for place in edit.places]
        return shared(own, edit.rank, edit.side, edit.private_rank, edit.pivot)
    first, *others = sorted(edit.places, key=lambda place: place.layer != edit.anchor)
    changed = [members[place].name for place in places(edit.role, edit.layers)]
    return deltas([members[first], *(members[place] for place in others)], edit.rank, changed)


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
    seen: set[Place] = set()
    _check_quantized(spec, edits)
    for edit in in_floats(edits):
        assert not isinstance(edit, Slice | Quantize)
        if not edit.layers:
            raise LayershareError(f"The plan has a {edit.kind} of no layers; give it some or delete it.")
        if not isinstance(edit, Share | Delta):
            for layer in edit.layers:
                if not 0 <= layer < spec.n_layers:
                    raise LayershareError(f"The plan names layer {layer}, which this model does not have.")
        if isinstance(edit, Drop) and edit.part not in (*PARTS, "block"):
            raise unknown("part", edit.part, (*PARTS, "block"))
        if isinstance(edit, Merge):
            _check_merge(edit)
        for claim in _claims(spec, edit):
            if claim in seen:
                raise LayershareError(f"The plan names {claim[0]} of layer {claim[1]} twice; one edit can have it.")
            seen.add(claim)
        if isinstance(edit, Delta) and edit.layers == (edit.anchor,):
            raise LayershareError(
                f"The plan gives {edit.role} of layer {edit.anchor} a delta to its own weight alone; name other layers."
            )
        if isinstance(edit, Share | Delta):
            composition(spec, edit)
    kept = kept_layers(spec.n_layers, edits)
    if not kept:
        raise LayershareError("The plan leaves no layer of the model; keep at least one.")
    if len(kept) < spec.n_layers and (sharing(edits) or quantized(edits)):
        raise LayershareError("A plan that removes whole layers cannot share weights as well; compress in two steps.")


def _check_slice(spec: Spec, edits: Sequence[Edit]) -> None:
    dense = spec.sliceable().width
    if len(edits) > 1:
        raise LayershareError("A plan that slices can have no other edits; compress in two steps.")
    width = sliced_width(edits)
    if width is None or not 1 <= width <= dense:
        raise LayershareError(f"The plan slices to width {width}; this model's hidden states have {dense}.")


def _check_quantized(spec: Spec, edits: Sequence[Edit]) -> None:
    """That what is quantized is there, once, and that all that shares something is stored alike."""
    stored = quantized(edits)
    listed = [place for edit in edits if isinstance(edit, Quantize) for place in edit.places]
    if twice := [place for place, times in Counter(listed).items() if times > 1]:
        raise LayershareError(f"The plan quantizes {twice[0].role} of layer {twice[0].layer} twice; name it once.")
    for edit in edits:
        if isinstance(edit, Quantize):
            if not edit.places:
                raise LayershareError("The plan has a quantize of no places; give it some or delete it.")
            for place in edit.places:
                _require_place(spec, place)
                edit.of(alone(spec.by_place[place].member))
        if isinstance(edit, Share | Delta) and len({stored.get(place) for place in edit.places}) > 1:
            raise LayershareError(
                f"The plan stores matrices that share in different ways ('{edit.id}'); name all of them."
            )
        if isinstance(edit, Drop) and edit.part != "block":
            for place in _claims(spec, edit):
                if place in stored:
                    raise LayershareError(f"The plan quantizes {place.role} of layer {place.layer}, which it drops.")


def _require_place(spec: Spec, place: Place) -> None:
    if place not in spec.by_place:
        raise LayershareError(f"The plan names {place.role} of layer {place.layer}, which this model does not have.")


def _claims(spec: Spec, edit: Share | Delta | Drop | Merge) -> Sequence[Place]:
    """The linears that an edit changes."""
    if isinstance(edit, Share | Delta):
        return edit.places
    parts = (edit.part,) if isinstance(edit, Drop) and edit.part != "block" else PARTS
    return [Place(x.role, x.layer) for layer in edit.layers for part in parts for x in spec.part(layer, part)]


def _check_merge(edit: Merge) -> None:
    if edit.into not in edit.layers or len(edit.coefficients) != len(edit.layers):
        raise LayershareError(
            f"The merge into layer {edit.into} must list that layer and one coefficient for each of its layers."
        )
