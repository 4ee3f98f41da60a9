"""The planner: what it chooses, that it keeps to its options and its budget, and that its predictions come true."""

import itertools
import json

import pytest
import torch
from torch.func import functional_call

import layershare
from layershare.calibrate.stats import calibrate
from layershare.calibrate.text import load_text
from layershare.errors import LayershareError
from layershare.formulas.linalg import low_rank
from layershare.formulas.two_sided import seen_through
from layershare.methods import make_method, plan_with
from layershare.methods.auto import Auto
from layershare.model.describe import describe
from layershare.model.source import read_model, read_tokenizer
from layershare.model.weights import Weights
from layershare.plan.edits import Place, Share
from layershare.plan.evidence import Evidence
from layershare.plan.ranks import Group
from tests.families import CONFIGS, tiny_model
from tests.methods.evidence import measured

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")


SHARED = ["q", "v", "gate", "up"]


@pytest.fixture(scope="module")
def evidence(tmp_path_factory, tokenizer, words) -> Evidence:
    return measured(tiny_model("llama"), tmp_path_factory.mktemp("stats"), tokenizer, words, "inputs", "gradients")


def names_of(plan) -> set[str]:
    return {edit.id for edit in plan.edits if isinstance(edit, Share)}


def planned(evidence: Evidence, keep: float, **options):
    return plan_with(evidence.spec, "auto", make_method("auto", options), keep, "targets", evidence)


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5, 0.3])
@pytest.mark.parametrize(
    "options", [{}, {"two_sided": False}, {"pivot": False}, {"joint": ["q+k+v", "gate+up"]}, {"shared": SHARED}]
)
def test_plans_use_their_budget_up_to_half_a_percent(evidence, keep, options):
    plan = planned(evidence, keep, **options)
    kept = plan.after.targets.parameters / plan.before.targets.parameters
    assert 0.995 * keep <= kept <= keep
    assert plan.after.all.multiplications <= plan.before.all.multiplications
    assert planned(evidence, keep, **options).edits == plan.edits


def test_no_single_change_of_a_plan_would_cost_less(evidence):
    """Taking a rank from one matrix and giving another what that frees never lowers the predicted loss."""
    method = Auto(joint=())
    plan = planned(evidence, 0.6, joint=[])
    spec = evidence.spec
    ranks = {edit.places[0]: edit.rank for edit in plan.edits if isinstance(edit, Share)}
    spectra = {}
    for x in spec.linears:
        root = method.outer_root(evidence, x)
        assert root is not None
        moment = seen_through(evidence.weight(x), root)
        gram = evidence.gram(x).double()
        spectra[x.role, x.layer] = torch.linalg.eigvals(moment.T @ gram @ moment).real.sort(descending=True).values

    def size(place, rank):
        x = spec.linear(*place)
        return rank * (x.d_in + x.d_out) - rank**2

    gained, lost = [], []
    for place, rank in ranks.items():
        values = spectra[place]
        lost.append((float(values[rank - 1]) / (size(place, rank) - size(place, rank - 1)), rank > 1))
        gained.append(float(values[rank]) / (size(place, rank + 1) - size(place, rank)))
    # The best rank that could be added gains hardly more than the worst one that is there; what is left is spent.
    assert max(gained) < 1.6 * min(value for value, possible in lost if possible)


def test_ranks_are_multiples(evidence):
    plan = planned(evidence, 0.6, multiple=4)
    assert plan.edits
    assert all(isinstance(edit, Share) and edit.rank % 4 == 0 for edit in plan.edits)
    assert plan.after.targets.parameters <= 0.6 * plan.before.targets.parameters


def test_roles_share_a_basis_where_that_costs_less(tmp_path, tokenizer, words):
    model, generator = tiny_model("llama"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.model.layers[:2]:
            mlp, attention = block.mlp, block.self_attn
            for rank, pair in ((8, (mlp.gate_proj, mlp.up_proj)), (5, (attention.q_proj, attention.k_proj))):
                read = torch.randn(rank, 32, generator=generator)  # both read these directions alone
                for linear in pair:
                    linear.weight.copy_(torch.randn(linear.out_features, rank, generator=generator) @ read / 8)
    evidence = measured(model, tmp_path, tokenizer, words, "inputs", "gradients")
    names = names_of(planned(evidence, 0.5, joint=["gate+up", "q+k", "k+v", "q+k+v"]))
    assert {"gate+up.00", "gate+up.01"} <= names
    assert {"q+k.00", "q+k.01"} <= names
    assert not any("+" in name for name in names_of(planned(evidence, 0.5, joint=[])))
    for family in ("gpt2", "phi3"):  # which have no such roles
        other = measured(tiny_model(family), tmp_path / family, tokenizer, words, "inputs", "gradients")
        assert not any("+" in name for name in names_of(planned(other, 0.5)))


@pytest.mark.parametrize("option", ["plain", "shared"])
def test_roles_that_a_model_does_not_have_are_refused(option, tmp_path, tokenizer, words):
    other = measured(tiny_model("gpt2"), tmp_path, tokenizer, words, "inputs", "gradients")
    with pytest.raises(LayershareError, match="A 'gpt2' model has no role 'gate'; it has qkv, o, up, down"):
        planned(other, 0.5, **{option: ["gate"]})
    with pytest.raises(LayershareError, match=f"Unknown role in {option} 'gates'"):
        planned(other, 0.5, **{option: ["gates"]})


@pytest.mark.parametrize("option", ["gate+nothing", "gate", "gate+o", "q+q"])
def test_roles_that_cannot_share_are_refused(option, evidence):
    with pytest.raises(LayershareError, match="joint"):
        planned(evidence, 0.5, joint=[option])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared": ["down"]}, "Unknown role in shared 'down'"),
        ({"shared": ["gate"], "joint": ["gate+up"]}, "'gate' is in joint and in shared; leave it out of one of them."),
    ],
)
def test_layers_that_cannot_share_are_refused(options, message, evidence):
    with pytest.raises(LayershareError, match=message):
        planned(evidence, 0.5, **options)


@pytest.mark.parametrize("two_sided", [True, False])
def test_layers_share_a_basis_where_that_costs_less(two_sided, tmp_path, tokenizer, words):
    """Two layers whose matrices read one and the same space do, and lose what is predicted."""
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(8, 32, generator=generator)
    for layer in (1, 2):
        weight = model.get_parameter(f"model.layers.{layer}.mlp.up_proj.weight")
        weight.data = 0.1 * torch.randn(56, 8, generator=generator) @ read + 1e-3 * weight.data
    evidence = measured(model, tmp_path, tokenizer, words, "inputs", "gradients")
    method = Auto(shared=("up",), two_sided=two_sided)
    plan = plan_with(evidence.spec, "auto", method, 0.6, "targets", evidence)
    (share,) = (edit for edit in plan.edits if isinstance(edit, Share) and len(edit.layers) > 1)
    assert share.id == "up.01-02"
    private = planned(evidence, 0.6, two_sided=two_sided)
    if two_sided:
        assert plan.predicted_loss is not None
        assert private.predicted_loss is not None
        assert 0 < plan.predicted_loss < private.predicted_loss
    require_loses_what_is_predicted(method, share, evidence)


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("roles", ["gate+up", "q+k+v"])
def test_roles_that_share_a_basis_lose_what_is_predicted(roles, two_sided, evidence):
    places = tuple(Place(role, 1) for role in roles.split("+"))
    share = Group(places, "input", True).share(6)
    require_loses_what_is_predicted(Auto(two_sided=two_sided), share, evidence)


def require_loses_what_is_predicted(method: Auto, share: Share, evidence: Evidence) -> None:
    """The factors of a group lose what its plan is chosen by, each linear under the Gram of its own inputs."""
    linears = [evidence.spec.linear(*place) for place in share.places]
    seen, roots = method.weighed(evidence, linears, [evidence.weight(linear) for linear in linears])
    grams = [evidence.gram(linear) for linear in linears]
    made = method.factors(share, seen, grams)
    lost = whole = relative = 0.0
    for weight, coef, gram in zip(seen, made.coefs, grams, strict=True):
        rest = weight.double() - made.basis @ coef
        error, total = (float((x * (gram.double() @ x)).sum()) for x in (rest, weight.double()))
        lost, whole, relative = lost + error, whole + total, relative + error / total
    assert made.error == pytest.approx(lost / whole, rel=1e-4)
    predicted = float(method._tails(Group(share.places, "input", True), evidence)[share.rank])
    assert predicted == pytest.approx(0.5 * lost / evidence.stats.tokens if roots else relative, rel=1e-3)


def test_layers_that_share_are_solved_and_fitted_again(tmp_path, tokenizer, words):
    model = tiny_model("llama")
    for role in ("gate", "up", "q", "v"):
        part = "mlp" if role in ("gate", "up") else "self_attn"
        first = model.get_parameter(f"model.layers.0.{part}.{role}_proj.weight").data
        for layer in (1, 2):
            model.get_parameter(f"model.layers.{layer}.{part}.{role}_proj.weight").data = first.clone()
    where = {"blocks": 16, "length": 32, "folder": tmp_path / "out"}
    small = layershare.compress(
        model, tokenizer, keep=0.5, of="targets", text=words, **where, compare=False, shared=SHARED
    )
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert any(len({layer for _, layer in edit["places"]}) > 1 for edit in plan["edits"])
    kl = layershare.measure(small, tokenizer, text=words, original=model, length=32).kl
    assert kl is not None
    assert kl < 1


def test_too_small_a_budget_and_evidence_that_is_not_there(evidence, tmp_path, tokenizer, words):
    with pytest.raises(LayershareError, match="keep more"):
        planned(evidence, 0.001)
    with pytest.raises(LayershareError, match="plans by what it measures"):
        layershare.make_plan(CONFIGS["llama"](), method="auto")
    alone = measured(tiny_model("llama"), tmp_path, tokenizer, words, "inputs")
    with pytest.raises(LayershareError):
        planned(alone, 0.5)
    assert planned(alone, 0.5, two_sided=False).edits == planned(evidence, 0.5, two_sided=False).edits


def test_half_the_dropped_eigenvalues_are_the_rise_of_the_loss(tmp_path):
    """Of truncations of single matrices of a trained model: in the order of their KL divergences, and of their size."""
    folder = layershare.resolve("sample")
    model, _ = read_model(folder, dtype="float32")
    text = load_text("stdlib", read_tokenizer(folder), split="test", blocks=12, length=128)
    spec, weights = describe(model), Weights.of(model)
    stats = calibrate(weights, spec, text, tmp_path, batch_size=6, kinds={"inputs", "gradients"})
    evidence, method = Evidence(spec, weights, stats, text), Auto()

    @torch.no_grad()
    def logs(replaced: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(model, replaced, (text.tokens[:6],)).logits.log_softmax(-1)

    dense, predicted, seen = logs({}), [], []
    for role, layer in itertools.product(("q", "v", "o", "gate", "down"), (0, 4, 9)):
        x = spec.linear(role, layer)
        weight, root = evidence.weight(x), method.outer_root(evidence, x)
        assert root is not None
        left, right, _, values = low_rank(seen_through(weight, root), evidence.gram(x), 160)
        assert values is not None
        plain = left @ torch.linalg.solve_triangular(root, right.T, upper=True).T
        predicted.append(float(values[160:].sum()) / 2 / stats.tokens)
        small = logs({spec.weight_name(x): x.matrix(plain.float())})
        seen.append(float((dense.exp() * (dense - small)).sum(-1).mean()))
    ranks = torch.tensor([predicted, seen]).argsort().argsort().double()
    assert torch.corrcoef(ranks)[0, 1] > 0.9
    assert 0.2 < sum(predicted) / sum(seen) < 2


def test_the_plan_is_in_the_results(tmp_path, tokenizer, words):
    small = layershare.compress(
        tiny_model("llama"), tokenizer, method="auto", keep=0.5, of="targets", text=words, blocks=24, length=32,
        folder=tmp_path / "small",
    )  # fmt: skip
    plan = json.loads((tmp_path / "small" / "plan.json").read_text())
    assert plan["method"] == "auto"
    assert all(edit["pivot"] for edit in plan["edits"])
    assert sum(p.numel() for p in small.parameters()) == plan["after"]["all"]["parameters"]
