"""Bring one block's linears as near to another's as its free symmetries allow, in float64: pure functions of tensors.

Two things can be changed in a sub-layer without a change of what it computes: the order of its inner units (neurons of
an MLP, heads of an attention), and how the scale of the norm before it is divided between norm and readers. A unit owns
`size` columns of every reader and as many rows of the writer; an order lists, for every place, the unit that goes
there.

Units are compared by what their difference costs on the target's inputs, Σ‖X(w_t − w_a)‖². For readers that is, but for
terms that no assignment changes, the negative correlation of the units' pre-activations, the anchor's and the target's
on the same inputs: XW_a and XW_t meet in W_aᵀGW_t, so the Gram is all that has to be measured.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

SMALLEST_SCALE = 2.0**-10
"""Scales below this part of the largest one stay in their norm, lest its inputs are divided by almost nothing."""


def columns_apart(anchor: Tensor, target: Tensor, gram: Tensor | None, size: int = 1) -> Tensor:
    """Σ‖X(w_t − w_a)‖² / ‖XW_t‖² over the columns of unit i of the anchor and j of the target, at [i, j].

    `anchor` and `target`: d_in × units·size; `gram`: d_in × d_in of the target's inputs, `None` for 1.
    """
    wide, base = target.double(), anchor.double()
    weighted, weighted_base = (wide, base) if gram is None else (gram.double() @ wide, gram.double() @ base)
    own = _per_unit((wide * weighted).sum(0), size)
    theirs = _per_unit((base * weighted_base).sum(0), size)
    return _distances(_units(base.T, size) @ _units(weighted.T, size).T, theirs[:, None], own)


def rows_apart(anchor: Tensor, target: Tensor, gram: Tensor | None, size: int = 1) -> Tensor:
    """Σ Gᵣᵣ‖w_t − w_a‖² / Σ Gᵣᵣ‖w_t‖² over the rows r of unit i of the anchor and j of the target, at [i, j].

    Correlations between units are left out: with them, units could not be assigned one by one. `anchor` and `target`:
    units·size × d_out; `gram`: of the target's inputs, in the order of its rows, `None` for 1.
    """
    wide, base = target.double(), anchor.double()
    energy = wide.new_ones(len(wide)) if gram is None else gram.diagonal().double()
    weighted = energy[:, None] * wide
    own = _per_unit((wide * weighted).sum(1), size)
    theirs = _units(base.square().sum(1)[:, None], size) @ _units(energy[:, None], size).T
    return _distances(_units(base, size) @ _units(weighted, size).T, theirs, own)


def assign(costs: Tensor) -> Tensor:
    """The order of the target's units that costs least, `costs` being [place, unit]."""
    # What a place or a unit costs anyway does not decide, but lets the solver search 8 times longer (8192 units).
    apart = costs - costs.mean(0)
    apart -= costs.mean(1, keepdim=True)
    return torch.from_numpy(linear_sum_assignment(apart.cpu().numpy())[1])


def assign_heads(keys: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """The orders of key and query heads that together cost least.

    `keys` [place, head] are the costs of key heads, `queries` those of query heads, of which every key head has a group
    of as many; heads change places within their group, and groups as a whole.
    """
    n_keys = len(keys)
    groups = queries.unflatten(1, (n_keys, -1)).unflatten(0, (n_keys, -1)).transpose(1, 2)  # [place, group, ·, ·]
    inner = [[assign(costs) for costs in row] for row in groups]
    whole = keys.clone()
    for place, row in enumerate(inner):
        for group, order in enumerate(row):
            whole[place, group] += groups[place, group].gather(1, order[:, None].to(queries.device)).sum()
    outer = assign(whole)
    per_key = len(queries) // n_keys
    return outer, torch.cat([group * per_key + inner[place][group] for place, group in enumerate(outer.tolist())])


def members_of(order: Tensor, size: int) -> Tensor:
    """The rows or columns of units in an order, each unit having `size` of them."""
    return (order[:, None] * size + torch.arange(size)).flatten()


def foldable(scale: Tensor) -> Tensor:
    """The part of a norm's scale (d) that its readers can take over: scale / foldable is what the norm keeps."""
    return torch.where(scale.abs() > SMALLEST_SCALE * scale.abs().max(), scale, 1.0)


def _units(rows: Tensor, size: int) -> Tensor:
    """Rows, `size` per unit, as one row per unit."""
    return rows.reshape(len(rows) // size, -1)


def _per_unit(values: Tensor, size: int) -> Tensor:
    return values.unflatten(0, (-1, size)).sum(1)


def _distances(products: Tensor, theirs: Tensor, own: Tensor) -> Tensor:
    """‖a‖² − 2⟨a, t⟩ + ‖t‖², relative to all ‖t‖²."""
    return (theirs - 2 * products + own) / (own.sum() or 1)
