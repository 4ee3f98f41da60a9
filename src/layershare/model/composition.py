"""What stands in the place of dense matrices, as data: every linear layer a sum of products of factors.

y = Σ_terms f_m(… f_1(x)) + b. Names, shapes, sizes and owners of factors are here and nowhere else; what lays tensors
out, counts, swaps modules, splits them, trains or shows them loops over factors. No torch.

    shared basis      (basis*, coef), or (coef, basis*) on the output side
    hybrid            as shared, + (own, private): directions of each member's own
    deltas            (base*) + (down, up)
    pivoted basis     as shared, of another form

The pivoted form of a d × k matrix B on the input side is P[1; T]: k of its rows are the identity's, T: (d − k) × k has
the others, and P puts all d in their places; then z = xB = x[pivots] + x[others]·T. On the output side likewise.

The first member registers what is shared (*) for all, under its own name: one tensor, stored once.

A factor may be stored in few bits with a scale for each group of them; one factor alone, a dense matrix that
shares nothing, stands here for that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import chain, pairwise
from typing import Any, Literal, get_args

from layershare.errors import LayershareError, unknown
from layershare.formulas.quantize import Numbers
from layershare.values import Scheme

Form = Literal["dense", "pivoted"]
FORMS: tuple[Form, ...] = ("dense", "pivoted")
Side = Literal["input", "output"]
SIDES: tuple[Side, ...] = ("input", "output")
BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Member:
    """A linear layer in whose place the factors stand: its name relative to the base model, and the weight it had."""

    name: str
    d_in: int
    d_out: int
    conv1d: bool = False


Stored = dict[str, tuple[tuple[int, ...], str | None]]
"""Shape and dtype (`None`: the model's) of stored tensors, by name."""


FLOATS: dict[Scheme, tuple[int, int]] = {"nvfp4": (4, 16), "mxfp4": (4, 32)}
"""The bits and groups of the schemes that have no others."""


@dataclass(frozen=True)
class Storage(Numbers):
    """How a weight is stored in few bits; `formulas.quantize.dense_weight` makes a weight of its tensors.

    The last group of a row may be shorter. Raises `LayershareError` for schemes and bits that do not exist, groups of
    no numbers, and bits and groups that a scheme does not have.
    """

    def __post_init__(self) -> None:
        if self.scheme not in get_args(Scheme):
            raise unknown("scheme", str(self.scheme), get_args(Scheme))
        if type(self.bits) is not int or self.bits not in BITS:
            raise unknown("number of bits", str(self.bits), map(str, BITS))
        if type(self.group) is not int or self.group < 1:
            raise LayershareError(f"A group of {self.group!r} numbers has no scale: give 1 or more, such as 64.")
        if (own := FLOATS.get(self.scheme)) and own != (self.bits, self.group):
            raise LayershareError(f"{self.scheme} has {own[0]} bits in groups of {own[1]}: leave bits and groups out.")

    @classmethod
    def pair(cls, bits: int, basis_bits: int | None, group: int | None, scheme: Scheme) -> tuple[Storage, Storage]:
        """How factors are stored, and how bases. Raises as the class does.

        `basis_bits` are as many as `bits`, and the group is the scheme's usual one, where they are `None`.
        """
        usual = FLOATS[scheme][1] if scheme in FLOATS else cls.group
        how = usual if group is None else group, scheme
        return cls(bits, *how), cls(bits if basis_bits is None else basis_bits, *how)

    def tensors(self, rows: int, columns: int) -> Stored:
        """What is stored of a weight of that shape: eight numbers of b bits in b bytes."""
        codes = ((rows, columns), "int8") if self.bits == 8 else ((rows, self.bits * -(-columns // 8)), "uint8")
        scales = (rows, -(-columns // self.group)), None if self.scheme == "int" else "uint8"
        stored: Stored = {"codes": codes, "scales": scales}
        return {**stored, "tensor_scale": ((1, 1), None)} if self.scheme == "nvfp4" else stored

    def bytes(self, rows: Any, columns: Any, itemsize: int) -> Any:
        """The bytes of a weight of that shape, floats of `itemsize` bytes; of many, if these are tensors."""
        shapes = self.tensors(rows, columns).values()
        return sum(high * wide * (itemsize if dtype is None else 1) for (high, wide), dtype in shapes)

    def __str__(self) -> str:
        kind = f"{self.bits} bits" if self.scheme == "int" else self.scheme
        return f"{kind} in groups of {self.group}"


@dataclass(frozen=True)
class Factor:
    """One linear map of a product, a child `name` of the layer that registers it.

    `inward`, `outward`: its widths, `None` for the member's own d_in or d_out. `home`: the member that registers it for
    all; `None`: every member has its own. `form`: "pivoted" stores T as weight and, in `order`, where x or y has
    its numbers: P[1; T] meets x[order] on the input side, and its y is (z, zT)[order] on the output side. `storage`:
    how its weight is stored, `None` for the model's dtype.
    """

    name: str
    inward: int | None = None
    outward: int | None = None
    home: str | None = None
    form: Form = "dense"
    storage: Storage | None = None

    @property
    def pivots(self) -> Side | None:
        """The side on which it is pivoted, `None` if it is dense."""
        return None if self.form == "dense" else "input" if self.inward is None else "output"

    @property
    def order(self) -> str:
        """The name of the integer buffer beside a pivoted weight."""
        return f"{self.name}_order"

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of its tensors in the layer that registers it."""
        return tuple(self._named(1, 1))

    def shape(self, member: Member) -> tuple[int, int]:
        """Its weight's shape in a member, [out, in] as `nn.Linear` stores it."""
        rows = member.d_out if self.outward is None else self.outward
        columns = member.d_in if self.inward is None else self.inward
        if self.pivots is None:
            return rows, columns
        return (rows, columns - rows) if self.pivots == "input" else (rows - columns, columns)

    def tensors(self, member: Member) -> Stored:
        """What a member that registers it stores of it, by the names there."""
        return self._named(*self.shape(member))

    def _named(self, rows: int, columns: int) -> Stored:
        weight: Stored = {"weight": ((rows, columns), None)}
        weight = weight if self.storage is None else self.storage.tensors(rows, columns)
        named = {f"{self.name}.{key}": each for key, each in weight.items()}
        return named if self.pivots is None else {**named, self.order: ((rows + columns,), "int32")}

    def parameters(self, member: Member) -> int:
        """Its numbers, which are also its multiplications per token."""
        rows, columns = self.shape(member)
        return rows * columns

    def registered_by(self, member: Member) -> bool:
        """Whether it is a child of this member, and not of another one."""
        return self.home in (None, member.name)


@dataclass(frozen=True)
class Term:
    """A product of factors, the one that meets the input first; `members` have it, `None` for all."""

    factors: tuple[Factor, ...]
    members: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Composition:
    """Layers made of factors that at least one of them may share with the others.

    Raises `LayershareError` for what cannot be: widths that do not fit, ranks that the matrices do not allow.
    """

    members: tuple[Member, ...]
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        _check(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names."""
        return tuple(member.name for member in self.members)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """All factors, term after term."""
        return tuple(chain.from_iterable(term.factors for term in self.terms))

    @property
    def whole(self) -> bool:
        """Whether a whole matrix is among the terms, to which the products are deltas."""
        return any(len(term.factors) == 1 for term in self.terms)

    @property
    def parameters(self) -> int:
        """All stored numbers."""
        return sum(factor.parameters(member) for member, factor in self.stored())

    @property
    def multiplications(self) -> int:
        """Per token, in all members together."""
        terms = ((member, term) for member in self.members for term in self.terms_of(member.name))
        return sum(factor.parameters(member) for member, term in terms for factor in term.factors)

    def terms_of(self, name: str) -> tuple[Term, ...]:
        """The terms that a member is the sum of."""
        return tuple(term for term in self.terms if term.members is None or name in term.members)

    def users(self, factor: Factor) -> tuple[Member, ...]:
        """The members that multiply with a factor."""
        return tuple(m for m in self.members if any(factor in term.factors for term in self.terms_of(m.name)))

    def joins(self, factor: Factor) -> bool:
        """Whether several members use one and the same factor."""
        return factor.home is not None and len(self.users(factor)) > 1

    def stored(self) -> Iterator[tuple[Member, Factor]]:
        """Each factor as often as it is stored, with the member that registers it."""
        for member in self.members:
            for term in self.terms_of(member.name):
                yield from ((member, factor) for factor in term.factors if factor.registered_by(member))

    def parameters_of(self, member: Member) -> float:
        """The stored numbers of one member, what it shares being split evenly among its users."""
        factors = chain.from_iterable(term.factors for term in self.terms_of(member.name))
        return sum(each.parameters(member) / (len(self.users(each)) if each.home else 1) for each in factors)

    def within(self, names: Collection[str]) -> Composition:
        """The same for some of the members alone, of which the first registers what is shared."""
        members = tuple(member for member in self.members if member.name in names)
        terms = []
        for term in self.terms:
            has = None if term.members is None else tuple(name for name in term.members if name in names)
            if has is None or has:
                homed = (replace(each, home=each.home and members[0].name) for each in term.factors)
                terms.append(Term(tuple(homed), has))
        return _Part(members, tuple(terms))

    def stored_as(self, storage: Storage, shared: Storage) -> Composition:
        """The same with the factors stored so; those that the first member registers for all as `shared`."""

        def stored(factor: Factor) -> Factor:
            return replace(factor, storage=shared if factor.home else storage)

        return replace(self, terms=tuple(replace(t, factors=tuple(map(stored, t.factors))) for t in self.terms))

    def to_json(self) -> dict[str, Any]:
        """As it stands in `config.json`, without what has its default."""
        return _plain(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Composition:
        """Read what stands in `config.json`. Raises `TypeError` or `KeyError` for unknown or missing entries."""
        terms = []
        for term in values["terms"]:
            has = None if term.get("members") is None else tuple(term["members"])
            terms.append(Term(**{**term, "factors": tuple(map(_factor, term["factors"])), "members": has}))
        return cls(**{**values, "members": tuple(Member(**each) for each in values["members"]), "terms": tuple(terms)})


@dataclass(frozen=True)
class _Part(Composition):
    """Some members of a composition that was checked as a whole: a basis may have more rank than theirs would allow."""

    def __post_init__(self) -> None:
        pass


def shared(members: Sequence[Member], rank: int, side: Side, private_rank: int = 0, pivot: bool = False) -> Composition:
    """Members with one basis on a side, pivoted or dense, and own coefficients; a single one is plain low rank.

    With a private rank each has a product of that rank beside, which is its own. Raises `LayershareError` as
    `Composition`, and for an unknown side.
    """
    if side not in SIDES:
        raise unknown("side", str(side), SIDES)
    home, form = members[0].name if members else "", FORMS[pivot]
    if side == "input":
        factors = Factor("basis", outward=rank, home=home, form=form), Factor("coef", inward=rank)
    else:
        factors = Factor("coef", outward=rank), Factor("basis", inward=rank, home=home, form=form)
    own = Factor("own", outward=private_rank), Factor("private", inward=private_rank)
    return Composition(tuple(members), (Term(factors), Term(own)) if private_rank else (Term(factors),))


def deltas(members: Sequence[Member], rank: int, names: Sequence[str]) -> Composition:
    """Members that use one whole weight, the first one's; those of these names each with a delta of its own."""
    base = Factor("base", home=members[0].name)
    low_rank = Factor("down", outward=rank), Factor("up", inward=rank)
    return Composition(tuple(members), (Term((base,)), Term(low_rank, tuple(names))))


def alone(member: Member) -> Composition:
    """A dense layer as a composition: one factor, its own whole matrix."""
    return Composition((member,), (Term((Factor("base"),)),))


def _factor(values: dict[str, Any]) -> Factor:
    storage = values.get("storage")
    return Factor(**{**values, "storage": None if storage is None else Storage(**storage)})


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        values = {field.name: (getattr(value, field.name), field.default) for field in fields(value)}
        return {name: _plain(each) for name, (each, default) in values.items() if each != default}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _check(composition: Composition) -> None:
    """Raise `LayershareError` for a composition that cannot be."""
    names, terms = composition.names, composition.terms
    if not names or not all(isinstance(name, str) for name in names):
        raise LayershareError("A composition lists no member layers: repair its 'members' in config.json.")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise LayershareError(f"'{min(twice)}' is listed twice: a layer belongs to one composition only.")
    what = f"composition of '{names[0]}'"
    factors = [factor.name for factor in composition.factors]
    used = set(chain.from_iterable(names if term.members is None else term.members for term in terms))
    chained = all(
        term.factors
        and (term.factors[0].inward, term.factors[-1].outward) == (None, None)
        and all(a.outward == b.inward is not None for a, b in pairwise(term.factors))
        for term in terms
    )
    if not chained or used != set(names) or len(factors) > len(set(factors)):
        raise LayershareError(f"The factors of the {what} do not make its matrices: repair its 'terms' in config.json.")
    for factor in composition.factors:
        if factor.form not in FORMS:
            raise unknown("form", str(factor.form), FORMS)
        if factor.pivots and factor.inward == factor.outward:
            raise LayershareError(
                f"The {what} has '{factor.name}' pivoted, which must be the first or last of a product."
            )
        if factor.home is None:
            continue
        users = composition.users(factor)
        if factor.home != names[0] or users[0].name != names[0]:
            raise LayershareError(f"The {what} stores '{factor.name}' elsewhere than in its first member.")
        if len({factor.shape(user) for user in users}) > 1:
            raise LayershareError(
                f"The members of the {what} differ in the width of '{factor.name}': they cannot share it."
            )
    for term in terms:
        for rank in (factor.outward for factor in term.factors[:-1]):
            if type(rank) is not int or rank < 1:
                raise LayershareError(f"The {what} has rank {rank!r}: give a whole number from 1 up.")
            if rank > (limit := _limit(composition, term)):
                raise LayershareError(f"The {what} has rank {rank}: its matrices allow {limit} at most.")


def _limit(composition: Composition, term: Term) -> int:
    """The largest rank of a product: the smaller of what its first and its last factor can tell apart.

    Beside a shared factor the own ones of all members count together, as one matrix. A pivoted factor has rows left.
    """
    ends = ((term.factors[0], "d_in"), (term.factors[-1], "d_out"))
    together = any(factor.home for factor, _ in ends)
    widths = []
    for factor, end in ends:
        own = [getattr(user, end) for user in composition.users(factor)]
        widths.append((sum(own) if together and not factor.home else min(own)) - (factor.form == "pivoted"))
    return min(widths)
