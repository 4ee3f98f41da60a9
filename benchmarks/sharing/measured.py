"""Plans with and without bases that layers share, of equal size, carried out by the library and measured."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.sharing.formulas import polished, pooled, shared_losses
from benchmarks.sharing.ground import AUTO, Ground, seen
from benchmarks.sharing.windows import private_curve
from layershare.formulas.divergence import divergence
from layershare.formulas.linalg import Factors, balanced, refit
from layershare.methods import plan_with
from layershare.methods.auto import Auto
from layershare.methods.low_rank import solution
from layershare.model.arch import Linear
from layershare.plan.budget import measure
from layershare.plan.edits import Share, places
from layershare.plan.evidence import Evidence
from layershare.plan.method import Solution, Unit
from layershare.plan.plan import Plan
from layershare.plan.ranks import Group, group_cost, in_order, matrix_cost, natural_side, spend
from layershare.plan.search import Curve, Form, Window, choose
from layershare.recipe import Refine
from layershare.solve.apply import Factored, compressed
from layershare.solve.refine import refine_blocks
from layershare.solve.two_streams import refit_to_original
from layershare.store import Store

Values = dict[str, Any]


@dataclass(frozen=True)
class Together(Auto):
    """`auto`, and for groups the best shared bases that we know, with coefficients under each member's own Gram.

    The `error` of a group is its predicted loss.
    """

    def solve(self, unit: Unit, evidence: Evidence) -> Solution:
        """The factors of a group."""
        (share,) = unit.edits
        assert isinstance(share, Share)
        if len(share.places) == 1:
            return super().solve(unit, evidence)
        linears = [evidence.spec.linear(*place) for place in share.places]
        weights = [evidence.weight(linear) for linear in linears]
        members = [seen(evidence, linear) for linear in linears]
        basis = polished(members, pooled(members)[:, : share.rank])
        loss = float(shared_losses(members, basis)[-1])
        if share.side == "input":
            fits = (refit(basis, x.metric, weight) for x, weight in zip(members, weights, strict=True))
            factors = Factors(basis, tuple(fits), loss)
        else:
            fits = (refit(basis, x.metric, weight.T).T for x, weight in zip(members, weights, strict=True))
            factors = Factors(basis.T, tuple(fits), loss)
        return solution(evidence.spec, share, balanced(factors, share.side), weights[0].dtype)


def adjacent(linears: Sequence[Linear], size: int) -> Iterator[tuple[Linear, ...]]:
    """Linears in groups of `size`, in order, without what remains."""
    for start in range(0, len(linears) - size + 1, size):
        yield tuple(linears[start : start + size])


def offered(ground: Ground, keep: float, sizes: Sequence[int], roles: Sequence[str]) -> Plan:
    """The plan of least predicted loss where any run of so many layers, of any of these roles, may share a basis."""
    families = {}
    for role, linears in ground.spec.by_role.items():
        found = [Window(i, i + 1, (_private(ground, linear),)) for i, linear in enumerate(linears)]
        for size in sizes if role in roles else ():
            runs = [(start, start + size) for start in range(len(linears) - size + 1)]
            found += [Window(*run, (_shared(ground, linears[slice(*run)]),)) for run in runs]
        families[role] = found
        ground.forget()
    plan = private(ground, keep)
    choices = choose(families, ground.spec.n_layers, keep * plan.before.targets.parameters)
    edits = in_order(ground.spec, [x.curve.group.share(x.form.rank) for x in choices if x.form.rank is not None])
    return replace(plan, edits=edits, after=measure(ground.spec, edits))


def _private(ground: Ground, linear: Linear) -> Curve:
    sizes, losses = private_curve(ground.seen(linear))
    group = Group(places(linear.role, [linear.layer]), natural_side(linear.role), True)
    return Curve(group, [*map(Form, range(1, len(sizes))), Form()], losses, sizes)


def _shared(ground: Ground, linears: Sequence[Linear]) -> Curve:
    members = [ground.seen(linear) for linear in linears]
    group, losses = _group(linears), shared_losses(members, pooled(members))
    cost = group_cost(ground.spec, group)
    ranks = [k for k in range(1, _most(linears)) if cost.size(k) < cost.whole]
    sizes = torch.tensor([cost.size(k) for k in ranks], dtype=torch.float64)
    return Curve(group, [*map(Form, ranks)], losses[ranks], sizes)


def _group(linears: Sequence[Linear]) -> Group:
    role = linears[0].role
    return Group(places(role, [linear.layer for linear in linears]), natural_side(role), True)


def _most(linears: Sequence[Linear]) -> int:
    """Ranks of a shared basis are below this: a block that runs for itself has one member of a group alone."""
    return min(min(linear.d_in, linear.d_out) for linear in linears)


def private(ground: Ground, keep: float) -> Plan:
    """The plan of `auto`, in which nothing is shared."""
    return plan_with(ground.spec, "auto", AUTO, keep, "targets", ground.evidence)


def forced(ground: Ground, plan: Plan, groups: Iterable[Sequence[Linear]]) -> Plan:
    """A plan in which these groups share a basis, each of the size that its members had; no larger in all.

    Groups of which every member is dense stay so, and those whose rank would be too high stay private.
    """
    spec, alone = ground.spec, {edit.places[0]: edit for edit in plan.edits if isinstance(edit, Share)}
    chosen, costs, ranks = [], [], []
    for linears in groups:
        group = _group(linears)
        found = [alone.get(place) for place in group.places]
        matrices = [matrix_cost(linear, pivot=True) for linear in linears]
        size = sum(x.whole if edit is None else x.size(edit.rank) for x, edit in zip(matrices, found, strict=True))
        cost = group_cost(spec, group)
        if any(found) and (rank := int(cost.rank(size))) < _most(linears) - len(linears):
            chosen, costs, ranks = [*chosen, group], [*costs, cost], [*ranks, rank]
            alone = {place: edit for place, edit in alone.items() if place not in group.places}
    sizes = [int(cost.size(rank)) for cost, rank in zip(costs, ranks, strict=True)]
    rest = measure(spec, list(alone.values())).targets.parameters - sum(cost.whole for cost in costs)
    spend(ranks, sizes, costs, plan.after.targets.parameters - rest - sum(sizes), range(len(chosen)))
    shares = [group.share(rank) for group, rank in zip(chosen, ranks, strict=True)]
    edits = in_order(spec, [*alone.values(), *shares])
    return replace(plan, edits=edits, after=measure(spec, edits))


def predicted(ground: Ground, factored: Factored) -> float:
    """By how much a plan that is carried out is predicted to raise the loss."""
    shares = [edit for edit in factored.plan.edits if isinstance(edit, Share)]
    alone = tuple(share for share in shares if len(share.places) == 1)
    groups = sum(factored.found[share.id]["error"] for share in shares if len(share.places) > 1)
    return groups + (AUTO.predicted(alone, ground.evidence) or 0.0)


class Lab:
    """Carries out plans on one ground, with what is solved kept in a folder, and measures them on the test text."""

    def __init__(self, ground: Ground, work: Path) -> None:
        self.ground, self.work = ground, work
        self._original: list[Tensor] = []

    def carry_out(self, plan: Plan) -> Factored:
        """Its solution."""
        identity = {"model": self.ground.evidence.weights.fingerprint, "text": self.ground.evidence.text.identity}
        factored = Factored(self.ground.spec, plan, self.ground.evidence.weights, self.work, identity)
        factored.solve(Together(compare=False), self.ground.evidence)
        return factored

    def refit(self, factored: Factored) -> None:
        """Fit it again to the outputs of the original."""
        refit_to_original(factored, self.ground.evidence, AUTO.outer_root)

    def refine(self, factored: Factored) -> None:
        """Train it block by block."""
        refine_blocks(factored, Store(self.work / "refine", factored.identity), self.ground.evidence, Refine(), 0)

    @torch.no_grad()
    def divergences(self, factored: Factored) -> Tensor:
        """KL(original ‖ compressed), nats per token, of each block of the test text."""
        model, tokens = self.ground.evidence.weights.model, self.ground.test.tokens

        def log_probabilities(block: Tensor) -> Tensor:
            return torch.log_softmax(model(input_ids=block[None], use_cache=False).logits[0, :-1].float(), -1)

        if not self._original:
            self._original = [log_probabilities(block) for block in tokens]
        found = []
        with ExitStack() as stack:
            for layer, block in enumerate(self.ground.evidence.weights.blocks):
                stack.enter_context(compressed(block, layer, factored))
            for block, wanted in zip(tokens, self._original, strict=True):
                found.append(divergence(wanted, log_probabilities(block)) / len(wanted))
        return torch.tensor(found, dtype=torch.float64)
