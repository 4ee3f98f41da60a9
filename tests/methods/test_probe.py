import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

import layershare
from layershare.errors import LayershareError
from layershare.methods import make_method
from layershare.methods.merging import combine, merges, unmerged
from layershare.methods.probe import Probe
from layershare.plan.budget import allowed, parse_keep
from layershare.plan.edits import Drop, Merge
from tests.families import tiny_model
from tests.methods.known import edits_of


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_the_loss_is_that_of_a_model_with_other_weights_and_the_model_stays(family, evidence):
    model = tiny_model(family)
    measured = evidence(model)
    assert measured.text is not None
    probe = Probe(measured, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = measured.spec.weight_name(measured.spec.linears[-1])
    other = torch.randn_like(before[name])
    losses = [probe.loss({}), probe.loss({name: other}), probe.loss({})]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    changed = tiny_model(family)
    tokens = measured.text.tokens[:3]
    expected = []
    for weight in (before[name], other):
        changed.get_parameter(name).copy_(weight)
        logits = changed(tokens).logits[:, :-1]
        expected.append(cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item())
    assert losses == pytest.approx([*expected, expected[0]], rel=1e-5)
    assert losses[0] != losses[1]


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gptj", "bloom", "opt", "gemma2", "gemma3_text", "smollm3", "falcon"]
)
def test_final_states_are_those_of_the_model_that_a_run_writes(family, evidence, tmp_path):
    model = tiny_model(family)
    edits = [Drop("block", (0,)), Merge(1, (1, 3), (-0.5, 1.5))]
    measured = evidence(model)
    assert measured.text is not None
    probe = Probe(measured, 2)
    states = probe.final_states(edits)
    plan = json.loads(layershare.make_plan(model, method="svd", keep=0.9).to_json())
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"edits": [vars(edit) for edit in edits]}))
    small = layershare.compress(model, method="svd", plan=tmp_path / "plan.json")
    expected = small.base_model(measured.text.tokens[:2], use_cache=False).last_hidden_state
    torch.testing.assert_close(states, expected)
    whole = model.base_model(measured.text.tokens[:2], use_cache=False).last_hidden_state
    torch.testing.assert_close(probe.final_states([]), whole)
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("method", ["asvd", "bolaco", "laco"])
def test_methods_that_search_need_a_text(method, evidence):
    options = {"merged": 2} if method == "laco" else {}
    with pytest.raises(LayershareError, match="runs the model on a text"):
        edits_of(replace(evidence(tiny_model("llama")), calibration=None), method, 0.8, **options)


def test_merging_merged_blocks_gives_linear_combinations_of_the_first_ones():
    tensors = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inner = 0.25 * tensors[2] + 0.75 * tensors[3]
    outer = -tensors[1] + 2 * inner
    blocks = unmerged(5)
    blocks[2:4] = [combine([(0.25, blocks[2]), (0.75, blocks[3])])]
    blocks[1:3] = [combine([(-1.0, blocks[1]), (2.0, blocks[2])])]
    (merge,) = merges(blocks)
    assert (merge.into, merge.layers) == (1, (1, 2, 3))
    coefficients = torch.tensor(merge.coefficients, dtype=torch.float64)
    torch.testing.assert_close(coefficients @ tensors[list(merge.layers)], outer)


@pytest.mark.parametrize(("method", "options"), [("laco", {"merged": 2}), ("mka", {})])
def test_layers_of_different_shapes_are_not_merged(method, options):
    spec = layershare.describe(tiny_model("llama"))
    name = "model.layers.2.mlp.up_proj.weight"
    odd = replace(spec, tensors=spec.tensors | {name: ((40, 32), torch.float32)})
    budget = allowed(spec, parse_keep(0.9), "targets")
    make_method(method, options).require(spec, budget)
    with pytest.raises(LayershareError, match="Layer 2 of this model has other shapes"):
        make_method(method, options).require(odd, budget)
