from typing import Any

import pytest
import torch

from layershare.errors import LayershareError
from layershare.methods.laco import collapsed
from layershare.methods.merging import merges, unmerged
from layershare.methods.probe import Probe
from layershare.plan.edits import Merge, kept_layers
from tests.families import tiny_model
from tests.methods.known import deep_llama, edits_of, keep_without


def test_collapsing_adds_the_differences_to_the_first_layer():
    theta = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    once = theta[2] + (theta[3] - theta[2]) + (theta[4] - theta[2])
    twice = theta[1] + (once - theta[1])
    (merge,) = merges(collapsed(collapsed(unmerged(6), 2, 2), 1, 1))
    assert (merge.into, merge.layers) == (1, (1, 2, 3, 4))
    coefficients = torch.tensor(merge.coefficients, dtype=torch.float64)
    torch.testing.assert_close(coefficients @ theta[list(merge.layers)], twice)


def test_the_highest_layers_that_keep_the_output_similar_collapse(evidence):
    """With a threshold that every merge passes, the first one tried is taken: C layers from H − C on."""
    model = deep_llama()
    keep = keep_without(model, "block", 0, 1)
    edits = edits_of(evidence(model), "laco", keep, merged=3, threshold=-1)
    assert edits == (Merge(2, (2, 3, 4), (-1.0, 1.0, 1.0)),)
    edits = edits_of(evidence(model), "laco", keep, merged=3, threshold=-1, highest=4)
    assert edits == (Merge(1, (1, 2, 3), (-1.0, 1.0, 1.0)),)
    edits = edits_of(evidence(model), "laco", keep_without(model, "block", 0), merged=3, threshold=-1)
    assert edits == (Merge(2, (2, 3), (0.0, 1.0)),)  # one layer less is enough


def test_the_threshold_is_lowered_until_the_budget_is_met(evidence):
    """The merge of highest cosine is found, whatever the steps down to it, if the others are well below it."""
    model = deep_llama()
    layer: Any = model.base_model.get_submodule("layers.1")
    with torch.no_grad():
        layer.self_attn.o_proj.weight.mul_(0.2)
        layer.mlp.down_proj.weight.mul_(0.2)
    measured = evidence(model)
    probe = Probe(measured, 4)
    original = probe.final_states([]).flatten(1)
    cosines = {}
    for layer in range(4):
        merge = Merge(layer, (layer, layer + 1), (0.0, 1.0))
        cosines[merge] = torch.cosine_similarity(original, probe.final_states([merge]).flatten(1)).mean().item()
    best, second = sorted(cosines.values(), reverse=True)[:2]
    assert best < 0.9
    assert best - second > 0.05
    assert best == cosines[Merge(1, (1, 2), (0.0, 1.0))]  # not the first that is tried
    edits = edits_of(measured, "laco", keep_without(model, "block", 0), merged=2)
    assert edits == (max(cosines, key=lambda merge: cosines[merge]),)


def test_several_merges_land_at_the_nearest_size_below_the_budget(evidence):
    model = deep_llama(8)
    keep = keep_without(model, "block", *range(4)) + 0.01
    edits = edits_of(evidence(model), "laco", keep, merged=3, interval=1)
    assert len(kept_layers(8, edits)) == 4
    for edit in edits:
        assert isinstance(edit, Merge)
        assert sum(edit.coefficients) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"merged": 4}, "leave no room"), ({"merged": 2, "highest": 4}, "leave no room"), ({"merged": 2}, "keep more")],
)
def test_what_cannot_be_met_is_refused(options, message, evidence):
    with pytest.raises(LayershareError, match=message):
        edits_of(evidence(tiny_model("llama")), "laco", 0.2, **options)
