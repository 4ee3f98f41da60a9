import pytest
import torch

from layershare.errors import LayershareError
from layershare.methods import make_method, plan_with
from layershare.methods.fwsvd import FwSvd
from layershare.plan.edits import Share, places
from tests.families import tiny_model
from tests.methods.evidence import measured, unmeasured

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")


@pytest.mark.parametrize("role", ["q", "k", "up", "down"])
def test_every_matrix_is_the_svd_with_rows_weighted_by_the_root_of_their_fisher_information(
    role, tmp_path, tokenizer, words
):
    method = FwSvd()
    evidence = measured(tiny_model("llama"), tmp_path, tokenizer, words, "fisher")
    linear = evidence.spec.linear(role, 1)
    weight = evidence.weight(linear)
    importance = evidence.fisher(linear).double().sqrt()[:, None]
    u, s, vh = torch.linalg.svd(importance * weight.double(), full_matrices=False)
    published = (u[:, :5] * s[:5]) @ vh[:5] / importance
    for side in ("input", "output"):
        factors = method.factors(Share(places(role, (1,)), 5, side), [weight], [method.metric(evidence, linear)])
        pair = (factors.basis, factors.coefs[0]) if side == "input" else (factors.coefs[0], factors.basis)
        assert (pair[0] @ pair[1] - published).norm() / published.norm() < 1e-8
    assert factors.error == pytest.approx(float(s[5:].square().sum() / s.square().sum()), rel=1e-6)


def test_rows_that_no_gradient_reached_do_no_harm(tmp_path, tokenizer, words):
    method = FwSvd()
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").zero_()  # no gradient for gate and up
    evidence = measured(model, tmp_path, tokenizer, words, "fisher")
    for role in ("up", "down"):
        linear = evidence.spec.linear(role, 1)
        share = Share(places(role, (1,)), 5, "input")
        factors = method.factors(share, [evidence.weight(linear)], [method.metric(evidence, linear)])
        assert factors.basis.isfinite().all()
        assert factors.coefs[0].isfinite().all()


def test_it_gives_uniform_ranks_and_has_no_options_of_its_own():
    spec = unmeasured(tiny_model("gpt2")).spec
    plans = [plan_with(spec, name, make_method(name), 0.6, "targets") for name in ("fwsvd", "svd-llm")]
    assert plans[0].edits == plans[1].edits
    with pytest.raises(LayershareError, match=r"Unknown option of fwsvd 'rank'\. Known: multiple, pivot"):
        make_method("fwsvd", {"rank": 3})
