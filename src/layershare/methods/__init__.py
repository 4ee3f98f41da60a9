"""The methods, by name. A method is one file and one line here."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from math import ceil, floor
from typing import Any

from pydantic import ValidationError

from layershare.errors import LayershareError, unknown
from layershare.methods.asvd import Asvd
from layershare.methods.auto import Auto
from layershare.methods.basis_sharing import BasisSharing
from layershare.methods.bolaco import Bolaco
from layershare.methods.d_rank import DRank
from layershare.methods.delta import DeltaLlm
from layershare.methods.fwsvd import FwSvd
from layershare.methods.joint_drop import AttentionDrop, BlockDrop, JointDrop, MlpDrop
from layershare.methods.laco import LaCo
from layershare.methods.lord import Lord
from layershare.methods.mka import Mka
from layershare.methods.shortgpt import ShortGpt
from layershare.methods.slicegpt import SliceGpt
from layershare.methods.svd import Svd
from layershare.methods.svd_llm import SvdLlm
from layershare.methods.welore import WeLore
from layershare.model.arch import Spec
from layershare.plan.budget import Budget, Sizes, allowed, excess, measure, parse_keep
from layershare.plan.edits import Edit, Quantize, check
from layershare.plan.evidence import Evidence
from layershare.plan.method import Method
from layershare.plan.plan import Plan
from layershare.plan.ranks import private_groups, uniform
from layershare.values import checked, first_fault

METHODS: dict[str, type[Method]] = {
    "auto": Auto,
    "basis-sharing": BasisSharing,
    "d-rank": DRank,
    "svd-llm": SvdLlm,
    "lord": Lord,
    "fwsvd": FwSvd,
    "welore": WeLore,
    "svd": Svd,
    "asvd": Asvd,
    "bolaco": Bolaco,
    "delta": DeltaLlm,
    "slicegpt": SliceGpt,
    "shortgpt": ShortGpt,
    "joint-drop": JointDrop,
    "attention-drop": AttentionDrop,
    "mlp-drop": MlpDrop,
    "block-drop": BlockDrop,
    "laco": LaCo,
    "mka": Mka,
}


GROWTHS = 4
"""How often a budget is raised that leaves bytes over, where bases have other bits than the rest."""


def make_method(name: str, options: dict[str, Any] | None = None) -> Method:
    """The method of this name with these options. Raises `LayershareError` for unknown names and wrong values."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    method = METHODS[name]
    options = options or {}
    known = [field.name for field in fields(method)]
    for option in options:
        if option not in known:
            if not known:
                raise LayershareError(f"The method '{name}' has no options, so '{option}' cannot be set.")
            raise unknown(f"option of {name}", option, known)
    try:
        return checked(method, options)
    except ValidationError as error:
        path, said, _ = first_fault(error)
        raise LayershareError(f"Option '{'.'.join(path)}' of {name}: {said}.") from error


def name_of(method: Method) -> str:
    """The name under which a method is registered."""
    return next(name for name, kind in METHODS.items() if kind is type(method))


def plan_with(
    spec: Spec,
    name: str,
    method: Method,
    keep: float | str,
    of: str,
    evidence: Evidence | None = None,
    stored: Sequence[Quantize] = (),
) -> Plan:
    """The method's plan for `keep`, counted of all parameters or `of="targets"`; never over budget.

    `stored`: how it stores all matrices of the blocks, if not in floats; a size in bytes is that of the integers.
    Raises `LayershareError` if `keep` cannot be met, or if the method needs evidence that is not there.
    """
    evidence = evidence or Evidence(spec)
    if method.adaptive and evidence.opened is None:
        raise LayershareError(
            f"'{name}' plans by what it measures, so there is no plan before; compress, or give measured statistics."
        )

    def choose(budget: Budget) -> tuple[Edit, ...]:
        method.require(spec, budget)
        return *method.plan(spec, budget, evidence), *stored

    wanted, before, whole = parse_keep(keep), measure(spec, ()), measure(spec, stored)
    budget = allowed(spec, wanted, of, stored)
    tries = GROWTHS if any(edit.basis_bits != edit.bits for edit in stored) else 0
    if method.searches and wanted.bytes is not None:  # so that the search need not be repeated

        def evenly(less: Budget) -> tuple[Edit, ...]:
            return *uniform(spec, private_groups(spec.linears), less), *stored

        budget, *_ = _fitting(spec, whole, budget, wanted.bytes, evenly, tries)
        tries = 0
    size = wanted.bytes
    if size is None and method.offered_bits:
        others = before.all.bytes - before.targets.bytes if of == "all" else 0
        size = others + floor(budget.fraction * before.targets.bytes)
    _, edits, after = _fitting(spec, whole, budget, size, choose, tries)
    check(spec, edits)
    loss = None if stored else method.predicted(edits, evidence)
    kl = None if loss is None else evidence.expected(loss)
    return Plan(spec.model_type, name, asdict(method), keep, budget.of, before, after, edits, loss, kl)


def _fitting(
    spec: Spec,
    whole: Sizes,
    budget: Budget,
    size: int | None,
    choose: Callable[[Budget], tuple[Edit, ...]],
    tries: int,
) -> tuple[Budget, tuple[Edit, ...], Sizes]:
    """The largest budget found whose edits need no more than `size` bytes, if given, and multiply as often as allowed.

    `whole`: the sizes of the model with all its parameters. The file's header depends on the edits, too, and so do the
    products of what is shared. `tries`: so often a larger budget is tried where there is room, for edits of which a
    parameter takes other bytes than one of `whole`. With the edits, and the sizes after them.
    """
    first, targets, found = budget, whole.targets, None
    while True:
        edits = choose(budget)
        after, parameters = measure(spec, edits), budget.parameters
        if size is not None:
            more = (after.all if budget.of == "all" else after.targets).bytes - size
            parameters -= ceil(more * targets.parameters / targets.bytes)
        elif budget.of == "multiplications" and (more := excess(first, spec, after)) > 0:
            parameters = min(parameters - 1, parameters * first.parameters // (first.parameters + more))
        if parameters >= budget.parameters:
            if found is None or after.all.bytes > found[2].all.bytes:
                found = budget, edits, after
            if not tries or parameters < 1.005 * budget.parameters or budget.fraction == 1:
                return found
            tries, parameters = tries - 1, min(parameters, floor(first.parameters / first.fraction))
        fraction = min(1.0, budget.fraction * parameters / budget.parameters)
        budget = replace(budget, fraction=fraction, parameters=parameters)
