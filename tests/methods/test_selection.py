"""What the drop and merge methods choose, on models of which the right answer is known."""

from itertools import pairwise

import pytest
import torch

from layershare.errors import LayershareError
from layershare.methods.probe import Probe
from layershare.plan.edits import Drop, Merge
from tests.families import tiny_model
from tests.methods.known import deep_llama, edits_of, keep_without, silence

FAMILIES = ["llama", "gpt2", "gptj", "bloom", "olmo2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["shortgpt", "block-drop"])
def test_a_block_that_is_the_identity_is_dropped_first(family, method, evidence):
    model = tiny_model(family)
    silence(model, 2)
    assert edits_of(evidence(model), method, keep_without(model, "block", 2)) == (Drop("block", (2,)),)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "part"), [("attention-drop", "attention"), ("mlp-drop", "mlp")])
def test_a_sub_layer_that_adds_nothing_is_dropped_first(family, method, part, evidence):
    model = tiny_model(family)
    silence(model, 1, part)
    assert edits_of(evidence(model), method, keep_without(model, part, 1)) == (Drop(part, (1,)),)


def test_attentions_and_mlps_that_add_nothing_are_dropped_together(evidence):
    model = tiny_model("llama")
    silence(model, 2, "attention")
    silence(model, 0, "mlp")
    keep = keep_without(model, "attention", 2) + keep_without(model, "mlp", 0) - 1
    assert edits_of(evidence(model), "joint-drop", keep) == (Drop("attention", (2,)), Drop("mlp", (0,)))


def test_blocks_go_in_the_order_of_their_influence(evidence):
    model = deep_llama()
    measured = evidence(model)
    assert measured.text is not None
    with torch.no_grad():
        states = model(measured.text.tokens, output_hidden_states=True).hidden_states[:-1]  # the last one is normed
    influence = [1 - float(torch.cosine_similarity(x.double(), y.double(), dim=-1).mean()) for x, y in pairwise(states)]
    silence(model, 5)  # the block whose output is not among the states
    lowest = sorted(range(5), key=lambda layer: influence[layer])[:2]
    keep = keep_without(model, "block", 0, 1, 2)
    assert edits_of(evidence(model), "shortgpt", keep) == (Drop("block", tuple(sorted([*lowest, 5]))),)


@pytest.mark.parametrize(
    ("method", "options", "first"), [("laco", {"merged": 2}, 3), ("mka", {}, 3), ("mka", {}, 1), ("mka", {}, 4)]
)
def test_two_equal_layers_are_merged_first(method, options, first, evidence):
    model = deep_llama(equal=(first, first + 1))
    silence(model, first)
    silence(model, first + 1)
    (merge,) = edits_of(evidence(model), method, keep_without(model, "block", first), **options)
    assert isinstance(merge, Merge)
    assert (merge.into, merge.layers) == (first, (first, first + 1))
    assert sum(merge.coefficients) == 1


def test_of_two_equal_layers_laco_leaves_one_even_if_it_comes_from_above(evidence):
    """θ₂ + (θ₃ − θ₂) = θ₃: where layer 2 does the same as layer 1, merging it with layer 3 loses nothing either."""
    model = deep_llama(equal=(1, 2))
    silence(model, 1)
    silence(model, 2)
    measured = evidence(model)
    (merge,) = edits_of(measured, "laco", keep_without(model, "block", 1), merged=2)
    assert isinstance(merge, Merge)
    assert merge.layers in ((1, 2), (2, 3))
    probe = Probe(measured, 2)
    torch.testing.assert_close(probe.final_states([merge]), probe.final_states([]))


@pytest.mark.parametrize("method", ["shortgpt", "mka"])
def test_what_cannot_be_met_is_refused(method, evidence):
    with pytest.raises(LayershareError, match="keep more"):
        edits_of(evidence(tiny_model("llama")), method, 0.1)
