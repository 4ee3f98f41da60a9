"""Basis Sharing: one basis per group of layers, own coefficients per layer.

Paper: Wang, Chen, Lin, Li, Zhang, "Basis Sharing: Cross-Layer Parameter Sharing for Large Language Model
Compression", ICLR 2025, arXiv 2410.03765. In its symbols: with S from SᵀS = ΣXᵢᵀXᵢ over the n layers of a group,
S[W⁽¹⁾ … W⁽ⁿ⁾] = UΣVᵀ, the basis is B″ = S⁻¹U_kΣ_k and layer i keeps the coefficients C⁽ⁱ⁾, its columns of V_kᵀ; the
rank is k = ⌊x·d₁·d₂·n / (d₁ + n·d₂)⌋. W_Q, W_K, W_V, W_Up and W_Gate are shared by consecutive layers; W_O and W_Down
stay private (a group of one). From 40 % removed on, coefficients are fitted again to the inputs that compressed layers
give.

Where this differs
- from paper and code: where the Cholesky of a rank-deficient Gram fails, S comes from its eigendecomposition; both have
  a relative ridge; the product B″C⁽ⁱ⁾ is the same. U_k comes from the eigenproblem of S(ΣWᵢWᵢᵀ)Sᵀ, which is n·d₂/d₁
  times smaller than the SVD. Basis and coefficients get equal norms, not all of Σ in the basis, so that both fit half
  precision. A private matrix is solved on its smaller side, which has the same optimum.
- from the code: a remainder group gets the rank of its own size; the code gives it that of a full group and exceeds the
  budget. In small models, where rounding down leaves more than 0.5 % of the budget, single ranks are added.
- from the code: the refit is run by default from 40 % removed on (the published code never calls it), layer after layer
  with each layer's own Gram G′ᵢ of deviated inputs, C⁽ⁱ⁾ = (BᵀG′ᵢB + λ1)⁻¹BᵀG′ᵢWᵢ, as the paper says of SVD-LLM's
  update. The code pools the Grams of a group and takes all of them from one pass of the unrefitted model.
- the defaults follow the code where the paper is silent: with grouped-query attention k and v are private too (its
  Mistral setting), and GPT-2 shares c_attn, c_fc and attn.c_proj (its GPT-2 setting, though the paper keeps W_O
  private).
- `joint` is ours: one basis for all roles that read the same input, in all layers of a group, W⁽ⁱ⁾ being the matrices
  of these roles side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layershare.errors import unknown
from layershare.methods.low_rank import LowRank
from layershare.model.arch import READERS, ROLES, Spec
from layershare.plan.budget import Budget
from layershare.plan.edits import Place, Share
from layershare.plan.evidence import Evidence
from layershare.plan.ranks import Group, consecutive, natural_side, uniform
from layershare.values import Count, Flag, Names

REFIT_AT = 0.6
"""Refit when at most this fraction of the targets is kept."""


@dataclass(frozen=True)
class BasisSharing(LowRank):
    """Options of Basis Sharing."""

    group_size: Count = 2
    """Layers per group (n)."""
    shared: Names | None = None
    """Roles whose basis is shared; without, the authors' choice for the model's family."""
    joint: Flag = False
    """Roles that read the same input share one basis, too: gate and up; q, k and v."""

    def groups(self, spec: Spec) -> list[Group]:
        """The groups of linears. Raises `LayershareError` for roles that the model does not have."""
        return sharing_groups(spec, self.shared, self.group_size, self.pivot, self.joint)

    def require(self, spec: Spec, budget: Budget) -> None:
        """Raise `LayershareError` for roles that the model does not have."""
        self.groups(spec)

    def plan(self, spec: Spec, budget: Budget, evidence: Evidence) -> tuple[Share, ...]:
        """The same ratio for every group."""
        return uniform(spec, self.groups(spec), budget, self.multiple)

    def refits(self, fraction: float) -> bool:
        """From 40 % removed on."""
        return fraction <= REFIT_AT


def sharing_groups(
    spec: Spec, shared: Sequence[str] | None, size: int, pivot: bool = False, joint: bool = False
) -> list[Group]:
    """Groups of `size` consecutive layers for the `shared` roles, groups of one for the others.

    `None` shares the authors' choice. `joint`: those of the shared roles that read the same input are in one group.
    Raises `LayershareError` for a role that the model does not have.
    """
    for role in shared or ():
        if role not in ROLES:
            raise unknown("role", role, ROLES)
        spec.require_role(role)
    chosen = default_shared_roles(spec, joint) if shared is None else shared
    groups = []
    for roles in _reading_together(spec, chosen if joint else ()):
        sharing = roles[0] in chosen and size * len(roles) > 1
        side = "input" if sharing else natural_side(roles[0])
        for layers in consecutive(spec.by_role[roles[0]], size if sharing else 1):
            together = tuple(Place(role, layer) for layer in layers for role in roles)
            groups.append(Group(together, side, pivot))
    return groups


def _reading_together(spec: Spec, chosen: Sequence[str]) -> list[tuple[str, ...]]:
    """All roles, those of the chosen ones together that read the same inputs in the same layers."""
    found: dict[Any, list[str]] = {}
    for role, linears in spec.by_role.items():
        inputs = tuple((linear.layer, linear.site) for linear in linears)
        found.setdefault(inputs if role in chosen else role, []).append(role)
    return [tuple(roles) for roles in found.values()]


def default_shared_roles(spec: Spec, joint: bool = False) -> tuple[str, ...]:
    """The authors' choice: the readers; without k and v under grouped-query attention; GPT-2 with c_proj.

    Where roles are joint, k and v share with q under grouped-query attention, too.
    """
    if spec.model_type == "gpt2":
        return ("qkv", "up", "o")
    private = ("k", "v") if spec.grouped_query and not joint else ()
    return tuple(role for role in spec.roles if role in READERS and role not in private)
