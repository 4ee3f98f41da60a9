"""A plan for the eyes: groups, ranks, sizes before and after, and what the run will need."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from layershare.model.arch import WRITERS, Linear, Spec
from layershare.plan.edits import (
    Delta,
    Merge,
    Place,
    Share,
    composition,
    dropped_parts,
    kept_layers,
    quantized,
    sharing,
    sliced_width,
)
from layershare.plan.needs import Needs
from layershare.plan.plan import Plan
from layershare.plan.work import Speed
from layershare.units import duration, size


def plan_table(spec: Spec, plan: Plan, needs: Needs | None = None, speed: Speed | None = None) -> RenderableType:
    """The plan as tables for a terminal: a line per role and run of like groups, then totals and needs."""
    groups = _table(f"{plan.method} on {spec.model_type}, keep {plan.keep} of {plan.of}")
    groups.add_column("role", no_wrap=True)
    groups.add_column("layers", min_width=6)
    groups.add_column("shape", min_width=5)
    groups.add_column("groups", min_width=7, justify="right")
    stored = {place: edit.bits for place, edit in quantized(plan.edits).items()}
    for column in ("rank", "parameters", "kept", *(["bits"] if stored else [])):
        groups.add_column(column, justify="right", no_wrap=True)
    shared = sharing(plan.edits)
    sliced = sliced_width(plan.edits)
    kept, dropped = set(kept_layers(spec.n_layers, plan.edits)), set(dropped_parts(plan.edits))
    for role, linears in spec.by_role.items():
        edits = [edit for edit in dict.fromkeys(shared.values()) if edit.roles[0] == role]
        for _, run in groupby(edits, key=lambda edit: (edit.roles, len(edit.places), _how(edit), _private(edit))):
            _add_groups(groups, spec, list(run), stored)
        stays = [x for x in linears if x.layer in kept and (x.layer, x.part) not in dropped]
        if gone := [x for x in linears if x not in stays]:
            shape = f"{gone[0].d_in} × {gone[0].d_out}"
            count = sum(linear.parameters for linear in gone)
            groups.add_row(role, _range([x.layer for x in gone]), shape, "", "gone", *_kept(count, 0))
        dense = [linear for linear in stays if (role, linear.layer) not in shared]
        if sliced is not None:
            _add_sliced(groups, linears, sliced)
        elif dense:
            count = sum(linear.parameters for linear in dense)
            shape = f"{dense[0].d_in} × {dense[0].d_out}"
            places = [Place(role, linear.layer) for linear in dense]
            row = role, _range([x.layer for x in dense]), shape, "", "dense", *_kept(count, count)
            groups.add_row(*row, *([_bits(places, stored)] if stored else []))
    if sliced is not None:
        shortcuts = len(spec.sliceable().sublayers)
        layers, count = _range(list(range(spec.n_layers))), shortcuts * sliced**2
        groups.add_row("shortcut", layers, f"{sliced} × {sliced}", "new", "", f"{count:,}", "")
    totals = _table()
    totals.add_column("")
    for column in ("before", "after", "kept"):
        totals.add_column(column, justify="right", no_wrap=True)
    for part, of in (("all", ""), ("targets", " of the targets")):
        before, after = getattr(plan.before, part), getattr(plan.after, part)
        for name in ("parameters", "bytes", "multiplications"):
            old, new = getattr(before, name), getattr(after, name)
            per_token = " per token" if name == "multiplications" else ""
            totals.add_row(f"{name}{of}{per_token}", f"{old:,}", *_kept(old, new))
    notes = [f"Layer {e.into} stands for {_range(list(e.layers))}." for e in plan.edits if isinstance(e, Merge)]
    said = []
    if plan.expected_kl is not None:
        kl = f"a KL divergence of {plan.expected_kl:.2g} nats per token from the original"
        said.append(f"Expected: {kl}, less after a refit.")
    elif plan.predicted_loss is not None:
        said.append(f"Predicted: a loss higher by {plan.predicted_loss:.2g} nats per token, or up to four times that.")
    if needs is not None:
        said.append(needs_sentence(needs, speed))
    return Group(groups, *notes, totals, *said)


def needs_sentence(needs: Needs, speed: Speed | None = None) -> str:
    """What the run will need, for people; the time, too, if the machine's speed is known."""
    disk = f"{size(needs.output)} of disk, and {size(needs.stats)} of disk for statistics"
    words = f"The run needs about {size(needs.memory)} of memory beside its libraries, {disk}"
    if speed is None:
        return f"{words}."
    return f"{words}; about {duration(needs.work.seconds(speed))} on this machine ({speed.place})."


def _table(title: str | None = None) -> Table:
    """A table that is as narrow as can be."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _bits(places: Sequence[Place], stored: Mapping[Place, int]) -> str:
    """The bits of a number at some places, from the least to the most."""
    bits = sorted({stored[place] for place in places if place in stored})
    return "–".join(map(str, dict.fromkeys((*bits[:1], *bits[-1:]))))


def _add_groups(table: Table, spec: Spec, edits: list[Share | Delta], stored: Mapping[Place, int]) -> None:
    linears = [spec.linear(*place) for edit in edits for place in edit.places]
    after = sum(composition(spec, edit).parameters for edit in edits)
    n, shapes = len(edits[0].places), dict.fromkeys(f"{x.d_in} × {x.d_out}" for x in linears)
    least, most, private = min(x.rank for x in edits), max(x.rank for x in edits), _private(edits[0])
    table.add_row(
        "+".join(edits[0].roles),
        _range(list(dict.fromkeys(linear.layer for linear in linears))),
        ", ".join(shapes),
        f"{len(edits)} × {n} ({_how(edits[0])})" if n > 1 else f"{len(edits)} × 1",
        f"{least:,}" + (f"–{most:,}" if most > least else "") + (f" + {private:,}" if private else ""),
        *_kept(sum(linear.parameters for linear in linears), after),
        *([_bits([place for edit in edits for place in edit.places], stored)] if stored else []),
    )


def _private(edit: Share | Delta) -> int:
    return edit.private_rank if isinstance(edit, Share) else 0


def _how(edit: Share | Delta) -> str:
    """The side that a group shares, or that its layers have deltas: all of them, or all but the anchor."""
    if isinstance(edit, Share):
        return f"{edit.side}, pivoted" if edit.pivot else edit.side
    return "delta" if len(edit.layers) < len(edit.places) else "mean, delta"


def _add_sliced(table: Table, linears: Sequence[Linear], width: int) -> None:
    first = linears[0]
    d_in, d_out = (first.d_in, width) if first.role in WRITERS else (width, first.d_out)
    before, after = first.parameters * len(linears), d_in * d_out * len(linears)
    shape, layers = f"{first.d_in} × {first.d_out}", [linear.layer for linear in linears]
    table.add_row(first.role, _range(layers), shape, "sliced", f"{width:,}", *_kept(before, after))


def _kept(before: int, after: int) -> tuple[str, str]:
    return f"{after:,}", f"{after / before:.1%}"


def _range(layers: list[int]) -> str:
    consecutive = layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}–{layers[-1]}" if consecutive and len(layers) > 1 else ", ".join(map(str, layers))
