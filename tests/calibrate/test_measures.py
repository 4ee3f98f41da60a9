"""What measures add up are sums over tokens: those of two parts of a text finish as those of the whole text do."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from layershare.calibrate.measures import Changes, GradientGrams, InputGrams, Measure, SquaredGradients, site_modules
from layershare.model.arch import Linear
from layershare.model.describe import describe
from layershare.model.weights import Weights
from tests.families import tiny_model, tokens

TEXT = tokens(6, 24)
LAYER = 1


def measures(spec) -> dict[str, Measure]:
    start = f"{spec.blocks}.{LAYER}."
    linears: list[Linear] = [linear for linear in spec.linears if linear.layer == LAYER]
    return {
        "inputs": InputGrams(site_modules(spec, LAYER), magnitudes=True),
        "blocks": Changes(start, [x.name.removeprefix(start) for x in spec.part(LAYER, "mlp")], len(TEXT)),
        "gradients": GradientGrams({x.name.removeprefix(start): x.name for x in linears}),
        "fisher": SquaredGradients({spec.weight_name(x): x for x in linears}, len(TEXT), TEXT.shape[1] - 1),
    }


@pytest.mark.parametrize("kind", ["inputs", "blocks", "gradients", "fisher"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sums_of_two_parts_finish_as_the_whole(family, kind):
    model = tiny_model(family)
    spec = describe(model)
    whole, first, second = (measures(spec)[kind] for _ in range(3))
    for measure, part in ((whole, TEXT), (first, TEXT[:2]), (second, TEXT[2:])):
        with measure.attach(model if kind == "fisher" else Weights.of(model).blocks[LAYER]):
            for block in part.split(1):
                logits = model(input_ids=block, use_cache=False).logits[0, :-1]
                cross_entropy(logits, block[0, 1:], reduction="sum").backward()
    expected = whole.finish()
    for name, total in second.sums.items():
        first.sums[name] += total
    found = first.finish()
    assert found.keys() == expected.keys()
    for name in found.keys() - {"pooled"}:  # which are rows, of each part the first
        torch.testing.assert_close(found[name], expected[name])


def test_nothing_stays_attached():
    model = tiny_model("llama")
    spec, block = describe(model), Weights.of(model).blocks[LAYER]
    for kind, measure in measures(spec).items():
        with measure.attach(model if kind == "fisher" else block):
            model(input_ids=TEXT[:1]).logits.sum().backward()
        before = {name: total.clone() for name, total in measure.sums.items()}
        model(input_ids=TEXT[:1]).logits.sum().backward()
        assert all(torch.equal(total, before[name]) for name, total in measure.sums.items()), kind
    assert all(parameter.grad is not None for parameter in model.parameters())
