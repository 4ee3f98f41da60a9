import pytest
import torch

from layershare.methods import make_method
from layershare.methods.low_rank import LowRank
from layershare.plan.edits import Share, Side, places
from tests.families import tiny_model
from tests.methods.evidence import measured

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")


@pytest.mark.parametrize(("role", "side"), [("q", "input"), ("up", "input"), ("down", "output")])
def test_every_matrix_is_projected_onto_the_main_directions_of_its_outputs(
    role, side: Side, tmp_path, tokenizer, words
):
    evidence = measured(tiny_model("llama"), tmp_path, tokenizer, words, "inputs")
    linear = evidence.spec.linear(role, 2)
    weight = evidence.weight(linear)
    wide, gram = weight.double(), evidence.gram(linear).double()
    projector = torch.linalg.eigh(wide.T @ gram @ wide).eigenvectors[:, -6:]
    expected = wide @ projector @ projector.T
    share = Share(places(role, (2,)), 6, side)
    products = []
    for name in ("lord", "svd-llm"):
        method = make_method(name)
        assert isinstance(method, LowRank)
        factors = method.factors(share, [weight], [method.metric(evidence, linear)])
        assert factors.basis.shape == ((linear.d_in, 6) if side == "input" else (6, linear.d_out))
        left, right = (factors.basis, factors.coefs[0]) if side == "input" else (factors.coefs[0], factors.basis)
        products.append(left @ right)
    torch.testing.assert_close(products[0], expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(products[1], expected, rtol=0, atol=1e-6)  # the same optimum
