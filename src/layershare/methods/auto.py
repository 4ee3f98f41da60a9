"""Auto: ranks and dense matrices chosen together by what each costs the loss, in pivoted form.

The curvature of the loss at a matrix is taken to be G ⊗ Γ (K-FAC), G the Gram of its inputs and Γ that of the loss's
gradients at its outputs. The truncation that costs least under it is the closed form of every low-rank method, of the
matrix seen through Γ^½ (`formulas/two_sided`: OBD-LLM, arXiv 2604.00821; KFAC-SVD, arXiv 2610.32878), and half the sum
of the dropped eigenvalues is the predicted rise of the loss per token. So errors of different matrices can be compared:
the plan is the choice of rank, or dense, for every matrix that costs least within the budget (`plan/search`). Bases are
in pivoted form, k² parameters fewer each. Roles that read the same input can share one where that costs less (`joint`),
and so can up to three adjacent layers, for the roles in `shared`: it has Basis Sharing's directions, while
coefficients, and what is lost, are those under each layer's own Gram (docs/sharing.md says where that pays).

The plan is a prediction. So two others are solved beside it and measured on text that is held out (`rivals`), and the
best is kept: it is never worse there than `svd-llm` or `basis-sharing` of the same size and form. What is solved is
fitted again to the outputs of the original, matrix by matrix, with the text passing through both (`solve/two_streams`),
and that is kept, too, if it is nearer to the original (the recipe's `refit` turns it on and off).

Where this differs from KFAC-SVD: Γ is the plain mean of gᵀg. Clipping the norms of tokens and leaving out the ends of
each block, as its code does, made SmolLM2-135M worse at 20 % removed; shrinking Γ gains nothing and is off.

Weighing output errors of q and k alike (`plain`) was worse on all of our models, too.

With `bits` to choose from, a matrix may also be stored as integers, whole or as factors. What that costs is measured
(`precision`), and sizes are bytes: ranks and bits are one choice, at one price. The plan beside it is one of bits alone
then, and what is measured are integers.

Every ingredient is an option. Without `two_sided` the loss of a matrix is its relative error ‖X(W − Ŵ)‖² / ‖XW‖², and
no gradients are measured.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from layershare.calibrate.stats import Statistic
from layershare.errors import LayershareError, unknown
from layershare.formulas.linalg import (
    Factors,
    balanced,
    energy,
    refit,
    relative_error,
    shared_spectra,
    spectrum,
    square_root,
)
from layershare.formulas.two_sided import seen_through, shrunk
from layershare.methods.basis_sharing import BasisSharing
from layershare.methods.low_rank import LowRank
from layershare.methods.svd_llm import SvdLlm
from layershare.model.arch import READERS, ROLES, Linear, Spec
from layershare.model.composition import Storage
from layershare.plan.budget import Budget
from layershare.plan.edits import Edit, Place, Quantize, Share, quantized
from layershare.plan.evidence import Evidence
from layershare.plan.method import Method
from layershare.plan.precision import Noise, bytes_of_factors, dense_noise, factors_noise, offered, probed_ranks
from layershare.plan.ranks import Group, group_cost, in_order, private_groups
from layershare.plan.search import Curve, Form, Window, choose, frontier
from layershare.values import Flag, Names, Number, Wholes

Part = Annotated[Number, Field(ge=0, lt=1)]
TOGETHER = 3
"""Layers that may share a basis at most."""


@dataclass(frozen=True)
class Auto(LowRank):
    """Options of the planner."""

    follows_original: ClassVar[bool] = True
    pivot: Flag = True
    """Store the bases in pivoted form: k² parameters fewer each, so that ranks are higher at the same size."""
    two_sided: Flag = True
    """Weigh errors by the gradients of the loss at a matrix's outputs, not by their relative size alone."""
    plain: Names = ()
    """Roles whose output errors count the same in every direction; how much a role counts is still measured."""
    joint: Names = ()
    """Roles that may share a basis in a layer, where they read the same input: gate+up, q+k, k+v, q+k+v."""
    shared: Names = ()
    """Roles of which up to three adjacent layers may share a basis, where that costs less: gate, up."""
    shrink_inputs: Part = 0.0
    """How far Grams of inputs are pulled towards one that favours no direction (0: not, 1: all the way)."""
    shrink_gradients: Part = 0.0
    """The same of Grams of gradients."""
    bits: Wholes = ()
    """Bits of a number to choose from beside the model's own, such as 2,3,4,6: `keep` counts bytes then."""
    ranks: Flag = True
    """Choose ranks, too; without it, only the bits of whole matrices are chosen."""
    compare: Flag = True
    """Solve other plans, too, and keep the one that is nearest to the original on text that is held out."""

    @property
    def uses(self) -> frozenset[Statistic]:
        """Grams of inputs and of gradients."""
        return frozenset({"inputs", "gradients"} if self.two_sided else {"inputs"})

    @property
    def adaptive(self) -> bool:
        """It plans by what it measures."""
        return True

    @property
    def offered_bits(self) -> tuple[int, ...]:
        """Those of its options."""
        return self.bits

    def refits(self, fraction: float) -> bool:
        """At every size; whether it helps is measured on text that is held out."""
        return True

    def rivals(self) -> dict[str, Method]:
        """`svd-llm` and `basis-sharing`, with bases of the same form; of ranks and bits, bits alone.

        (Ranks alone lost several times as much as bits, at every size that was measured: docs/bytes.md.)
        """
        if not self.compare:
            return {}
        if self.bits:
            return {"bits alone": replace(self, ranks=False)} if self.ranks else {}
        form: Any = {"pivot": self.pivot, "multiple": self.multiple}
        return {"svd-llm": SvdLlm(**form), "basis-sharing": BasisSharing(**form)}

    def require(self, spec: Spec, budget: Budget) -> None:
        """Raise `LayershareError` for bits that do not exist and roles that cannot share a basis."""
        for bits in self.bits:
            Storage(bits)
        if not self.ranks and not self.bits:
            raise LayershareError("Without ranks there are only bits to choose; give bits, or leave ranks out.")
        if self.bits and (self.joint or self.shared):
            raise LayershareError("bits are planned for matrices on their own: leave joint and shared out, or bits.")
        if self.bits and budget.of == "multiplications":
            raise LayershareError("Fewer bits do not save multiplications: leave bits out, or count bytes.")
        joined = [role for together in self.joint for role in together.split("+")]
        for where, roles, known in (
            ("joint", joined, ROLES),
            ("shared", self.shared, READERS),
            ("plain", self.plain, ROLES),
        ):
            for role in roles:
                if role not in known:
                    raise unknown(f"role in {where}", role, known)
                spec.require_role(role)
        for together in self.joint:
            roles = together.split("+")
            if len(set(roles)) < max(2, len(roles)):
                raise LayershareError(f"'{together}' in joint must name two or more roles, such as gate+up.")
            if len({spec.linear(role, 0).site for role in roles}) > 1:
                raise LayershareError(f"'{together}' in joint: these roles do not read the same input in this model.")
        for role in self.shared:
            if role in joined:
                raise LayershareError(f"'{role}' is in joint and in shared; leave it out of one of them.")

    def metric(self, evidence: Evidence, linear: Linear) -> Tensor:
        """The Gram of a linear's inputs."""
        gram = evidence.gram(linear)
        return shrunk(gram, self.shrink_inputs) if self.shrink_inputs else gram

    def outer_root(self, evidence: Evidence, linear: Linear) -> Tensor | None:
        """R with RᵀR the Gram of the gradients at a linear's outputs."""
        if not self.two_sided:
            return None
        share = 1.0 if linear.role in self.plain else self.shrink_gradients
        return square_root([shrunk(evidence.gradient_gram(linear), share)])

    def plan(self, spec: Spec, budget: Budget, evidence: Evidence) -> tuple[Edit, ...]:
        """The ranks, and the bits, that cost the loss least, by what is predicted."""
        if budget.fraction == 1:
            return ()
        alone = [linear for linear in spec.linears if linear.role not in self.shared]
        families = {site: list(self._windows(spec, linears, evidence)) for site, linears in _by_site(alone).items()}
        families |= {x: list(self._runs(spec, y, evidence)) for x, y in spec.by_role.items() if x in self.shared}
        length = max(window.end for windows in families.values() for window in windows)
        for windows in families.values():  # all cover the same number of places
            windows.append(Window(max(window.end for window in windows), length, ()))
        try:
            choices = choose(families, length, budget.parameters)
        except ValueError as error:
            least = "rank 1" if self.ranks else f"{min(self.bits)} bits"
            raise LayershareError(f"keep leaves less than {least} for every matrix; keep more.") from error
        shares = [x.curve.group.share(x.form.rank) for x in choices if x.form.rank is not None]
        stored: dict[tuple[int, int], list[Place]] = {}
        for each in choices:
            if each.form.bits is not None:
                stored.setdefault(each.form.bits, []).extend(each.curve.group.places)
        as_integers = [Quantize(tuple(stored[basis, own]), own, basis) for basis, own in sorted(stored)]
        return *in_order(spec, shares), *as_integers

    def predicted(self, edits: tuple[Edit, ...], evidence: Evidence) -> float | None:
        """Half the sum of the dropped eigenvalues of all groups, and what integers add; nothing without gradients."""
        if not self.two_sided:
            return None
        shares, lost = [edit for edit in edits if isinstance(edit, Share)], 0.0
        for share in shares:
            lost += float(self._tails(Group(share.places, share.side, share.pivot), evidence)[share.rank])
        of_place = {share.places[0]: share for share in shares}
        for place, edit in quantized(edits).items():
            noise, share = self._noise(place, evidence), of_place.get(place)
            if share is None:
                lost += noise.of_dense(edit.bits)
            else:
                lost += float(noise.of_factors(edit.basis_bits, edit.bits, torch.tensor(share.rank), share.side))
        return lost

    def factors(self, share: Share, weights: Sequence[Tensor], metrics: Sequence[Tensor | None]) -> Factors:
        """The factors of one group; where layers share a basis, with coefficients under each one's own Gram."""
        made = super().factors(share, weights, metrics)
        grams = [metric for metric in metrics if metric is not None]
        if len(share.layers) == 1 or share.side == "output" or share.private_rank:
            return made
        coefs = tuple(refit(made.basis, gram, weight) for gram, weight in zip(grams, weights, strict=True))
        rests = (weight.double() - made.basis @ coef for weight, coef in zip(weights, coefs, strict=True))
        return balanced(replace(made, coefs=coefs, error=relative_error(rests, weights, grams)), share.side)

    def _windows(self, spec: Spec, linears: Sequence[Linear], evidence: Evidence) -> Iterator[Window]:
        """What may stand in the place of linears that read the same input."""
        curves: dict[Group, Curve] = {}  # most groups are in several partitions
        for groups in self._partitions(linears):
            for group in groups:
                if group not in curves:
                    curves[group] = self._curve(spec, group, evidence)
            yield Window(0, 1, tuple(curves[group] for group in groups))

    def _runs(self, spec: Spec, linears: Sequence[Linear], evidence: Evidence) -> Iterator[Window]:
        """What may stand in the place of a role's linears in all layers: bases of their own, or of adjacent layers."""
        for first in range(len(linears)):
            for end in range(first + 1, min(first + TOGETHER, len(linears)) + 1):
                run = linears[first:end]
                if len({(linear.d_in, linear.d_out) for linear in run}) == 1:
                    group = Group(tuple(Place(x.role, x.layer) for x in run), "input", self.pivot)
                    yield Window(first, end, (self._curve(spec, group, evidence),))

    def _partitions(self, linears: Sequence[Linear]) -> Iterator[list[Group]]:
        """Ways to put linears into groups: each for itself, and with bases that roles may share."""
        of_role = {linear.role: linear for linear in linears}
        sets = [tuple(each.split("+")) for each in self.joint]
        sets = [roles for roles in sets if of_role.keys() >= set(roles)]
        for count in range(len(sets) + 1):
            for chosen in combinations(sets, count):
                joined = [role for roles in chosen for role in roles]
                if len(set(joined)) == len(joined):
                    shared = [Group(tuple(Place(r, of_role[r].layer) for r in x), "input", self.pivot) for x in chosen]
                    yield shared + private_groups((x for x in linears if x.role not in joined), self.pivot)

    def _curve(self, spec: Spec, group: Group, evidence: Evidence) -> Curve:
        """Predicted loss and parameters of a group by rank."""
        cost = group_cost(spec, group)
        tails = self._tails(group, evidence) if self.ranks else torch.zeros(1, dtype=torch.float64)
        ranks = [k for k in range(self.multiple, len(tails) - 1, self.multiple) if cost.size(k) < cost.whole]
        sizes = torch.tensor([*(cost.size(k) for k in ranks), cost.whole], dtype=torch.float64)
        curve = Curve(group, [*map(Form, ranks), Form()], torch.cat([tails[ranks], tails.new_zeros(1)]), sizes)
        return self._with_integers(spec, curve, ranks, tails, evidence) if self.bits else curve

    def _with_integers(self, spec: Spec, curve: Curve, ranks: list[int], tails: Tensor, evidence: Evidence) -> Curve:
        """A curve with everything that it offers as integers, too, in numbers of the model's own size."""
        group = curve.group
        (place,) = group.places
        linear, noise, at = spec.linear(*place), self._noise(place, evidence), torch.tensor(ranks)
        itemsize = spec.tensors[spec.weight_name(linear)][1].itemsize
        dense, pairs = [(bits, bits) for bits in self.bits], list(offered(self.bits)) if ranks else []
        losses = [curve.losses, torch.tensor([noise.of_dense(bits) for bits in self.bits], dtype=torch.float64)]
        whole = [Storage(bits).bytes(linear.d_out, linear.d_in, itemsize) for bits in self.bits]
        sizes = [curve.sizes, torch.tensor(whole, dtype=torch.float64) / itemsize]
        for basis, own in pairs:
            losses.append(tails[ranks] + noise.of_factors(basis, own, at, group.side))
            sizes.append(bytes_of_factors(linear, group, Storage(basis), Storage(own), at, itemsize) / itemsize)

        def form(entry: int) -> Form:
            if entry < len(curve.forms):
                return curve.forms[entry]
            entry -= len(curve.forms)
            if entry < len(dense):
                return Form(None, dense[entry])
            pair, rank = divmod(entry - len(dense), len(ranks))
            return Form(ranks[rank], pairs[pair])

        lost, taken = torch.cat(losses), torch.cat(sizes)
        best = frontier(lost, taken)
        return Curve(group, [form(entry) for entry in best.tolist()], lost[best], taken[best])

    def _noise(self, place: Place, evidence: Evidence) -> Noise:
        """What a matrix loses as integers, whole and, where ranks are chosen, as factors."""
        linear = evidence.spec.linear(*place)
        (group,) = private_groups([linear], self.pivot)
        ranks = probed_ranks(linear) if self.ranks else ()
        about = (place, self.two_sided, self.shrink_inputs, self.shrink_gradients, place.role in self.plain)

        @cache
        def known() -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Callable[[Tensor], float]]:
            weight, gram = evidence.weight(linear), self.metric(evidence, linear)
            seen, roots = self.weighed(evidence, [linear], [weight])
            scale = 0.5 / evidence.stats.tokens if roots else 1 / (energy(weight, gram) or 1.0)

            def loss(error: Tensor) -> float:
                return scale * energy(seen_through(error, roots[0]) if roots else error, gram)

            return weight, gram, seen, roots, loss

        def of_dense(bits: int) -> Tensor:
            weight, gram, _, _, loss = known()
            return dense_noise(weight, gram, bits, loss)

        def of_factors(rank: int) -> Tensor:
            weight, gram, seen, roots, loss = known()
            factors = self.weighed_factors(group.share(rank), seen, roots, [gram])
            return factors_noise(weight, gram, factors, group.side, self.pivot, loss)

        def kept(key: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
            return evidence.lasting(place.layer, (*key, *about), compute)

        dense = [kept(("bits", bits), partial(of_dense, bits)) for bits in self.bits]
        pairs = [kept(("rank", rank, self.pivot), partial(of_factors, rank)) for rank in ranks]
        return Noise(self.bits, torch.stack(dense), ranks, torch.stack(pairs, 1) if pairs else torch.empty(2, 0))

    def _tails(self, group: Group, evidence: Evidence) -> Tensor:
        """Rank, from 0 to the full one -> the predicted rise of the loss per token, or the relative error."""

        def compute() -> Tensor:
            linears = [evidence.spec.linear(*place) for place in group.places]
            seen, roots = self.weighed(evidence, linears, [evidence.weight(linear) for linear in linears])
            metrics = [self.metric(evidence, linear) for linear in linears]
            if len(linears) > 1:
                spectra = shared_spectra(seen, metrics)
                scales = [1.0 if roots else float(each.sum()) or 1.0 for each in spectra]
                values = torch.stack([each / scale for each, scale in zip(spectra, scales, strict=True)]).sum(0).cpu()
            else:
                values = spectrum(seen, metrics, group.side).cpu()
            whole = float(values.sum()) or 1.0
            values *= 0.5 / evidence.stats.tokens if roots else len(linears) / whole
            tails = (values.sum() - torch.cat([values.new_zeros(1), values.cumsum(0)])).clamp(min=0)
            # Ranks above what a matrix could have for itself are not offered.
            return tails[: min(linears[0].d_in, linears[0].d_out) + 1]

        plain = tuple(place.role in self.plain for place in group.places)
        return evidence.once((group, self.two_sided, self.shrink_inputs, self.shrink_gradients, plain), compute)


def _by_site(linears: Iterable[Linear]) -> dict[str, list[Linear]]:
    """Site -> the linears that read the same input."""
    found: dict[str, list[Linear]] = {}
    for linear in linears:
        found.setdefault(linear.site, []).append(linear)
    return found
