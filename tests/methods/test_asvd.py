import pytest
import torch

from layershare.errors import LayershareError
from layershare.methods import plan_with
from layershare.methods.asvd import Asvd, Truncation, search
from layershare.methods.probe import Probe
from layershare.model.describe import describe
from layershare.plan.budget import Budget, allowed, measure, parse_keep
from layershare.plan.edits import Share, places
from tests.families import CONFIGS, tiny_model
from tests.methods.known import edits_of, silence

SPEC = describe(CONFIGS["llama"]())


def budget(keep: float) -> Budget:
    return allowed(SPEC, parse_keep(keep), "targets")


@pytest.mark.parametrize(("family", "role"), [("llama", "up"), ("llama", "down"), ("gpt2", "qkv")])
def test_factors_are_the_svd_of_the_scaled_weight(family, role, evidence):
    measured = evidence(tiny_model(family))
    linear = measured.spec.linear(role, 1)
    weight = measured.weight(linear).double()
    scale = measured.magnitude(linear).double().sqrt()
    u, sigma, v = torch.linalg.svd(scale[:, None] * weight, full_matrices=False)
    expected = (u[:, :9] * sigma[:9]) @ v[:9] / scale[:, None]
    share = Share(places(role, (1,)), 9, "input")
    factors = Asvd().factors(share, [weight], [Asvd().metric(measured, linear)])
    torch.testing.assert_close(factors.basis @ factors.coefs[0], expected, rtol=1e-6, atol=1e-8)
    assert factors.error == pytest.approx(float(sigma[9:].square().sum() / sigma.square().sum()))


def truncations(losses):
    """Ranks 2, 4 and 8 for every linear, with losses by (linear's position, rank)."""
    return [Truncation(x, rank, losses(i, rank)) for i, x in enumerate(SPEC.linears) for rank in (2, 4, 8)]


@pytest.mark.parametrize("keep", [0.35, 0.6, 0.9, 0.99])
def test_the_search_meets_the_budget_with_the_least_harmful_truncations(keep):
    generator = torch.Generator().manual_seed(0)
    harm = torch.rand(len(SPEC.linears), generator=generator).tolist()
    tried = truncations(lambda i, rank: harm[i] / rank)
    shares = search(SPEC, budget(keep), tried)
    size = measure(SPEC, shares).targets.parameters
    assert 0.995 * budget(keep).parameters <= size <= budget(keep).parameters

    # Brute force over all thresholds: every pair below the threshold is carried out, nothing above it.
    def carried_out(threshold):
        return {x: min(t.rank for t in tried if t.linear == x and t.loss <= threshold) for x in SPEC.linears
                if any(t.linear == x and t.loss <= threshold for t in tried)}  # fmt: skip

    def parameters(ranks):
        saved = sum(x.parameters - rank * (x.d_in + x.d_out) for x, rank in ranks.items())
        return sum(x.parameters for x in SPEC.linears) - saved

    thresholds = sorted(t.loss for t in tried)
    lowest = next(t for t in thresholds if parameters(carried_out(t)) <= budget(keep).parameters)
    expected = carried_out(lowest)
    found = {SPEC.linear(*share.places[0]): share.rank for share in shares}
    assert found.keys() == expected.keys()
    larger = [x for x in found if found[x] > expected[x]]
    assert all(found[x] >= expected[x] for x in found)
    at_the_threshold = next(t.linear for t in tried if t.loss == lowest)
    assert set(larger) <= {at_the_threshold} or all(
        found[x] - expected[x] <= 1 for x in larger if x != at_the_threshold
    )


def test_a_budget_below_the_lowest_ratio_is_refused(evidence):
    with pytest.raises(LayershareError, match="set a higher 'ratios'"):
        edits_of(evidence(tiny_model("llama")), "asvd", 0.4, ratios=1, samples=1)


@pytest.mark.parametrize("of", ["all", "targets"])
def test_a_size_in_bytes_is_met_by_one_search(of, evidence, monkeypatch):
    measured = evidence(tiny_model("llama"))
    tried = []
    plan = Asvd.plan
    monkeypatch.setattr(Asvd, "plan", lambda self, *known: tried.append(known) or plan(self, *known))
    allowed_bytes = int(0.8 * getattr(measure(SPEC, ()), of).bytes)
    found = plan_with(SPEC, "asvd", Asvd(ratios=2, samples=1), f"{allowed_bytes / 1000}kB", of, measured)
    assert 0.98 * allowed_bytes <= getattr(found.after, of).bytes <= allowed_bytes
    assert len(tried) == 1


def test_truncating_what_is_not_used_costs_nothing(evidence):
    model = tiny_model("llama")
    silence(model, 2, "mlp")
    measured = evidence(model)
    probe = Probe(measured, 1)
    whole = probe.loss({})
    for linear in measured.spec.linears[-14:]:  # layers 2 and 3
        losses = [each.loss for each in Asvd(ratios=2)._truncations(linear, measured, probe)]
        unused = (linear.layer, linear.part) == (2, "mlp")
        assert all((loss == whole) == unused for loss in losses), linear.name


def test_sensitivities_are_the_losses_of_truncated_models(evidence):
    measured = evidence(tiny_model("gpt2"))
    linear = measured.spec.linear("up", 3)
    method = Asvd(ratios=3, samples=2)
    probe = Probe(measured, 2)
    found = list(method._truncations(linear, measured, probe))
    assert [each.rank for each in found] == [6, 12, 19]  # of 32 × 128 weights ¼, ½ and ¾
    for each in found:
        share = Share(places("up", (3,)), each.rank, "input")
        weight = measured.weight(linear)
        factors = method.factors(share, [weight], [method.metric(measured, linear)])
        product = (factors.basis @ factors.coefs[0]).to(weight.dtype)
        assert each.loss == pytest.approx(probe.loss({measured.spec.weight_name(linear): product}), rel=1e-5)
