"""Models that have lost attentions, MLPs or whole blocks."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import layershare
from layershare.errors import LayershareError
from layershare.model.depth import cut_layers
from layershare.plan.edits import Drop, Merge, dropped_parts, kept_layers
from layershare.plan.plan import Plan
from tests.families import CONFIGS, tiny_model, tokens


def carried_out(model, edits, folder) -> Any:
    """The model after these edits, as loaded from a folder written by a run."""
    plan = json.loads(layershare.make_plan(model, method="svd", keep=0.9).to_json())
    plan["edits"] = [vars(edit) for edit in edits]
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan))
    return layershare.compress(model, method="svd", plan=folder / "plan.json", folder=folder / "small")


@torch.no_grad()
def logits(model):
    return model(tokens(), use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "gptj", "gemma2"])
def test_a_dropped_part_is_one_whose_output_weights_are_zero(family, tmp_path):
    model = tiny_model(family)
    spec = layershare.describe(model)
    edits = [Drop("attention", (0, 2)), Drop("mlp", (1, 2))]
    small = carried_out(model, edits, tmp_path / "a")
    with torch.no_grad():
        for layer, part in dropped_parts(edits):
            writer = model.base_model.get_submodule(spec.part(layer, part)[-1].name)
            for parameter in writer.parameters():
                parameter.zero_()
    torch.testing.assert_close(logits(small), logits(model))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "small").dequantize()
    assert dense.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(logits(dense), logits(model))


def test_a_dense_copy_of_a_cast_model_has_one_dtype(tmp_path):
    small = carried_out(tiny_model("llama"), [Drop("attention", (0,)), Drop("mlp", (1,))], tmp_path / "a")
    dense = small.to(torch.bfloat16).dequantize()
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.bfloat16}
    assert logits(dense).isfinite().all()


def test_generation_is_right_although_the_first_layer_has_no_cache(tmp_path):
    small = carried_out(tiny_model("llama"), [Drop("attention", (0, 1))], tmp_path / "a")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = small.generate(tokens(), **options)
    assert torch.equal(cached, small.generate(tokens(), use_cache=False, **options))
    static = small.generate(tokens(), cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(cached, static)
    past = small(tokens(), use_cache=True).past_key_values
    assert past.layers[0].keys.numel() == 2 * 12
    assert past.get_seq_length() == 12


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "smollm3", "gpt2"])
def test_whole_blocks_go_as_if_they_had_never_been_there(family, tmp_path):
    model = tiny_model(family)
    small = carried_out(model, [Drop("block", (1, 2))], tmp_path / "a")
    config = json.loads((tmp_path / "a" / "small" / "config.json").read_text())
    assert "quantization_config" not in config
    assert small.config.num_hidden_layers == 2
    blocks = layershare.describe(model).blocks
    expected = tiny_model(family)
    kept = torch.nn.ModuleList([expected.base_model.get_submodule(f"{blocks}.{i}") for i in (0, 3)])
    expected.base_model.set_submodule(blocks, kept)
    cut_layers(expected.config, (0, 3))
    torch.testing.assert_close(logits(small), logits(expected))


def test_merged_blocks_are_linear_combinations(tmp_path):
    model = tiny_model("llama")
    small = carried_out(model, [Merge(1, (1, 2, 3), (-1.0, 1.0, 1.0))], tmp_path / "a")
    name = "mlp.up_proj.weight"
    ours: Any = small.model.layers
    theirs: Any = [model.get_parameter(f"model.layers.{i}.{name}") for i in range(4)]
    assert len(ours) == 2
    assert torch.equal(ours[0].get_parameter(name), theirs[0])
    merged = theirs[2].double() + theirs[3].double() - theirs[1].double()
    torch.testing.assert_close(ours[1].get_parameter(name).double(), merged, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([Drop("block", (0, 1, 2, 3))], "no layer"),
        ([Drop("block", (4,))], "layer 4, which this model does not have"),
        ([Drop("attention", (1,)), Drop("block", (1,))], "layer 1 twice"),
        ([Merge(0, (1, 2), (0.5, 0.5))], "must list that layer"),
        ([Merge(0, (0, 1), (0.5, 0.5)), Merge(2, (1, 2), (0.5, 0.5))], "layer 1 twice"),
    ],
)
def test_edits_that_do_not_fit_are_refused(edits, message, tmp_path):
    with pytest.raises(LayershareError, match=message):
        carried_out(tiny_model("llama"), edits, tmp_path / "a")


def test_shares_and_missing_blocks_do_not_mix(tmp_path):
    model = tiny_model("llama")
    plan = json.loads(layershare.make_plan(model, method="svd", keep=0.8).to_json())
    plan["edits"] = [plan["edits"][0], vars(Drop("block", (2,)))]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    with pytest.raises(LayershareError, match="removes whole layers cannot share"):
        Plan.read(path, layershare.describe(model))


def test_layers_are_counted_and_lists_per_layer_cut_along():
    assert kept_layers(6, [Drop("block", (0,)), Merge(2, (2, 3), (0.5, 0.5)), Drop("mlp", (4,))]) == [1, 2, 4, 5]
    config = CONFIGS["gemma3_text"]()
    cut_layers(config, (1, 2, 3))
    assert config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert AutoConfig.for_model(**config.to_dict()).num_hidden_layers == 3
