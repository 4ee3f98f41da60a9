"""Bolaco: low rank in the space of the outputs, with the ratios of the roles found by Bayesian optimisation.

Paper: Ji, Xiang, Li, Xia, Ye, Duan, Wang, Chen, Zhang, "Adaptive Feature-based Low-Rank Compression of Large Language
Models via Bayesian Optimization", EMNLP Findings 2024, arXiv 2405.10616. With V_k the top eigenvectors of the
covariance of the outputs Y = XW, W′ = WV_kV_kᵀ. The roles do not bear the same ratio: q and k have one in common, o,
gate, up and down one each, v stays dense. A Gaussian process proposes ratios, the perplexity that the model then has on
a sample of text is the objective, and the best allocation of all trials is taken. `segments` above 1 gives every depth
segment of the model ratios of its own. This is the paper's method without its post-training.

Cost: one decomposition per matrix and `trials` × `samples` runs of the model on one block of text. Model and factors,
about twice the model, must fit in memory. Needs optuna (the extra `search`).

Where this differs
- from paper and code: outputs are not centred: WᵀGW, pooled over the whole text, stands for their covariance, so there
  is no bias to correct. For one matrix V_k is then the optimum under its Gram, and solved on the smaller side.
- from paper and code: what is proposed are ratios relative to each other, scaled so that every trial meets the budget
  (none above 1); the code throws away proposals that miss it. Equal ratios and the code's starting point are tried
  first, so the result is never worse than equal ratios on the sample.
- from the code: 20 trials by default where it runs 50 (`trials=50`); the sample is from the calibration text, where it
  takes another; the objective is perplexity alone, where it adds a thousandth of a KL divergence; ranks are not rounded
  to multiples of 8; roles of other families (a fused qkv or gate_up) have a ratio each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from layershare.errors import LayershareError, how_to_install
from layershare.formulas.linalg import low_rank
from layershare.methods.low_rank import LowRank
from layershare.methods.probe import Probe, truncated
from layershare.model.arch import Linear, Spec
from layershare.plan.budget import Budget
from layershare.plan.edits import Share
from layershare.plan.evidence import Evidence
from layershare.plan.ranks import allocate, matrix_cost, private_groups
from layershare.values import Count, Trials, Whole

DENSE = ("v",)
"""Roles that stay as they are."""
LOWEST = 0.2
"""The lowest relative ratio that is proposed."""
START = {"qk": 0.5, "o": 0.5}
"""Where the published code starts, relative to ratios of 0.8 of the other roles."""


@dataclass(frozen=True)
class Bolaco(LowRank):
    """Options of Bolaco."""

    searches: ClassVar[bool] = True
    sizes: ClassVar[str] = "any above a dense v"
    trials: Trials = 20
    """Allocations that are tried."""
    samples: Count = 4
    """Blocks of the calibration text on which each is measured."""
    segments: Count = 1
    """Parts of the depth with ratios of their own."""
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0
    """Of the proposals."""

    @property
    def adaptive(self) -> bool:
        """It plans by what it measures."""
        return True

    def runs(self, spec: Spec) -> int:
        """Every trial on every sample."""
        return self.trials * self.samples

    def require(self, spec: Spec, budget: Budget) -> None:
        """Raise `LayershareError` if the optimiser is missing, for too many segments, or if v alone is too large."""
        if not find_spec("optuna"):
            raise LayershareError(f"bolaco needs optuna: {how_to_install('search')}.")
        if self.segments > spec.n_layers:
            raise LayershareError(f"The model has {spec.n_layers} layers: it cannot have {self.segments} segments.")
        if budget.parameters <= sum(x.parameters for x in spec.linears if x.role in DENSE):
            raise LayershareError(f"bolaco leaves {', '.join(DENSE)} dense, which takes the whole budget; keep more.")

    def plan(self, spec: Spec, budget: Budget, evidence: Evidence) -> tuple[Share, ...]:
        """The allocation of lowest loss among the trials."""
        import optuna

        if budget.fraction == 1:
            return ()
        names = {x: self._ratio_name(spec, x) for x in spec.linears if x.role not in DENSE}
        probe = Probe(evidence, self.samples)
        factors: dict[Linear, tuple[Tensor, Tensor]] = {}
        for x in names:
            weight, cost = evidence.weight(x), matrix_cost(x, self.pivot)
            left, right, *_ = low_rank(weight, evidence.gram(x), int(cost.rank(Fraction(cost.whole))) + 1)
            factors[x] = left.to(weight.dtype), right.to(weight.dtype)

        def shares(wanted: dict[str, float]) -> tuple[Share, ...]:
            return at_ratios(spec, budget, {x: wanted[name] for x, name in names.items()}, self.pivot, self.multiple)

        def loss(proposal: optuna.Trial) -> float:
            evidence.progress(proposal.number, self.trials)
            wanted = {name: proposal.suggest_float(name, LOWEST, 1) for name in dict.fromkeys(names.values())}
            replaced = {}
            for share in shares(wanted):
                x = spec.linear(*share.places[0])
                replaced[spec.weight_name(x)] = truncated(x, factors[x], share.rank)
            return probe.loss(replaced)

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.GPSampler(seed=self.seed)
        study = optuna.create_study(sampler=sampler)
        study.enqueue_trial(dict.fromkeys(names.values(), 1.0))
        study.enqueue_trial({name: START.get(name.partition(".")[0], 0.8) for name in names.values()})
        study.optimize(loss, n_trials=self.trials)
        return shares(study.best_params)

    def _ratio_name(self, spec: Spec, linear: Linear) -> str:
        """The name of the ratio that a linear takes part in: `qk.0`."""
        return f"{'qk' if linear.role in ('q', 'k') else linear.role}.{linear.layer * self.segments // spec.n_layers}"


def at_ratios(
    spec: Spec, budget: Budget, wanted: dict[Linear, float], pivot: bool = False, multiple: int = 1
) -> tuple[Share, ...]:
    """Ranks for ratios min(1, t·x) of the linears, x `wanted`, with the t that meets the budget; at 1 they stay dense.

    The linears that are not among these must not take the budget alone.
    """
    fixed = sum(linear.parameters for linear in spec.linears if linear not in wanted)
    linears, sizes = list(wanted), [linear.parameters for linear in wanted]
    ratios = scaled(list(wanted.values()), sizes, budget.parameters - fixed)
    low = [(x, ratio) for x, ratio in zip(linears, ratios, strict=True) if ratio < 1]
    dense = fixed + sum(size for size, ratio in zip(sizes, ratios, strict=True) if ratio == 1)
    exact = [matrix_cost(x, pivot).rank(ratio * x.parameters) for x, ratio in low]
    groups = private_groups((x for x, _ in low), pivot)
    return allocate(spec, groups, exact, budget.parameters - dense, multiple=multiple)


def scaled(wanted: Sequence[float], sizes: Sequence[int], available: int) -> list[float]:
    """rᵢ = min(1, t·xᵢ) with the largest t for which Σ rᵢPᵢ is no more than what is available."""
    order = sorted(range(len(wanted)), key=lambda i: -wanted[i])
    for position, i in enumerate(order):
        t = available / sum(wanted[j] * sizes[j] for j in order[position:])
        if t * wanted[i] < 1:
            return [1.0 if j in order[:position] else t * x for j, x in enumerate(wanted)]
        available -= sizes[i]
    return [1.0] * len(wanted)
