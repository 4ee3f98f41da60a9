"""Models in which layers use another layer's weight plus a delta: carried out, written, loaded, made dense."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from layershare.errors import LayershareError
from layershare.methods.delta import DeltaLlm
from layershare.model.arch import Spec
from layershare.model.composition import Composition
from layershare.model.describe import describe
from layershare.model.layers import ComposedLinear
from layershare.model.weights import Weights
from layershare.plan.budget import measure
from layershare.plan.edits import Delta, Drop, Edit, Share, composition, places
from layershare.plan.layout import composed_tensors
from layershare.plan.plan import Plan
from layershare.recipe import Recipe
from layershare.solve.apply import Factored
from layershare.solve.write import write_model
from tests.families import CONFIGS, tiny_model
from tests.model.small import logits


def planned(model: Any, edits: tuple[Edit, ...], folder: Path) -> Factored:
    spec = describe(model)
    plan = Plan(spec.model_type, "by-hand", {}, 1.0, "all", measure(spec, ()), measure(spec, edits), edits)
    return Factored(spec, plan, Weights.of(model), folder, {})


def names(factored: Factored, edit: Share | Delta) -> list[str]:
    """Full names of an edit's tensors in the checkpoint."""
    return list(composed_tensors(factored.spec, composition(factored.spec, edit)))


def store(factored: Factored, unit: str, tensors: dict[str, Tensor], **facts: Any) -> None:
    """Take these tensors for the solution of a unit."""
    factored.solved.write(unit, tensors, facts)
    assert factored.has(unit)


def solved(factored: Factored, edit: Delta) -> dict[str, Tensor]:
    """The tensors of a `Delta`: the best approximation of the differences in the Euclidean norm."""
    spec = factored.spec
    dense = {}
    for role, layer in edit.places:
        linear = spec.linear(role, layer)
        dense[layer] = linear.matrix(factored.weights.tensor(spec.weight_name(linear)))
    shared = dense[edit.anchor]
    if edit.anchor in edit.layers:
        shared = torch.stack(list(dense.values())).mean(0)
    tensors = [shared.T]
    for layer in edit.layers:
        u, s, v = torch.linalg.svd(dense[layer] - shared, full_matrices=False)
        a, b = u[:, : edit.rank] * s[: edit.rank], v[: edit.rank]
        tensors += [a.T, b.T]
    return dict(zip(names(factored, edit), tensors, strict=True))


def carried_out(model: Any, edits: tuple[Edit, ...], folder: Path) -> Factored:
    """A plan of deltas solved and written to `folder / "small"`."""
    factored = planned(model, edits, folder / "work")
    for unit in DeltaLlm().units(factored.spec, edits):
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        for edit in unit.edits:
            assert isinstance(edit, Delta)
            tensors |= solved(factored, edit)
            facts[edit.id] = {"error": 0.5}
        store(factored, unit.name, tensors, **facts)
    (folder / "small").mkdir()
    write_model(factored, Recipe("by-hand"), None, folder / "small")
    return factored


def loaded(folder: Path) -> Any:
    """The model in a folder that has all its tensors and no others."""
    auto_class: Any = AutoModelForCausalLM
    small, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return small


def everywhere(spec: Spec, rank: int | None = None) -> tuple[Delta, ...]:
    """Of every second role layers 1 and 3 as layer 0 with deltas, of the others 1 and 2 as a mean with deltas.

    Without a rank the deltas have full rank, with which nothing is lost.
    """
    edits = []
    for index, (role, linears) in enumerate(spec.by_role.items()):
        full = min(linears[0].d_in, linears[0].d_out)
        edits.append(Delta(role, 1, (1, 2), rank or full) if index % 2 else Delta(role, 0, (1, 3), rank or full))
    return tuple(edits)


@pytest.mark.parametrize("family", CONFIGS)
def test_deltas_of_full_rank_lose_nothing(family, tmp_path):
    model = tiny_model(family)
    expected = logits(model)
    factored = carried_out(model, everywhere(describe(model)), tmp_path)
    folder, after = tmp_path / "small", factored.plan.after
    assert (folder / "model.safetensors").stat().st_size == after.all.bytes
    small = loaded(folder)
    assert sum(isinstance(module, ComposedLinear) for module in small.modules()) > 4
    assert small.num_parameters() == after.all.parameters
    torch.testing.assert_close(logits(small), expected, rtol=1e-4, atol=1e-4)
    small.dequantize()
    assert small.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(logits(small), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_multiplications_and_parameters_are_those_that_the_model_has(family, tmp_path):
    model = tiny_model(family)
    spec = describe(model)
    after = carried_out(model, everywhere(spec, rank=3), tmp_path).plan.after
    small = loaded(tmp_path / "small")
    counted = 0

    def count(module, args, output):
        nonlocal counted
        counted += module.weight.numel()

    for module in small.base_model.get_submodule(spec.blocks).modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_hook(count)
    logits(small)
    assert counted == after.targets.multiplications
    assert small.num_parameters() == after.all.parameters


def test_deltas_beside_groups_and_dropped_parts(tmp_path):
    model = tiny_model("llama")
    share, delta, drop = Share(places("q", (0, 1)), 5, "input"), Delta("up", 0, (1, 2), 4), Drop("mlp", (3,))
    factored = planned(model, (delta, drop, share), tmp_path / "work")
    basis, *coefs = names(factored, share)
    tensors = {basis: torch.randn(5, 32)} | {name: torch.randn(32, 5) for name in coefs}
    store(factored, "share", tensors)
    store(factored, "up", solved(factored, delta))
    (tmp_path / "small").mkdir()
    write_model(factored, Recipe("by-hand"), None, tmp_path / "small")
    small = loaded(tmp_path / "small")
    assert small.num_parameters() == factored.plan.after.all.parameters
    assert small.hf_quantizer.edits.guard == "layers.0.mlp.up_proj.weight"
    assert (tmp_path / "small" / "model.safetensors").stat().st_size == factored.plan.after.all.bytes


def test_the_folder_says_who_shares_with_whom(tmp_path):
    model = tiny_model("llama")
    carried_out(model, (Delta("up", 0, (1, 3), 4), Delta("gate", 1, (1, 2), 4)), tmp_path)
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    up, gate = "layers.{}.mlp.up_proj", "layers.{}.mlp.gate_proj"
    low_rank = [{"name": "down", "outward": 4}, {"name": "up", "inward": 4}]
    assert config["compositions"] == [
        {
            "members": [{"name": name.format(layer), "d_in": 32, "d_out": 56} for layer in users],
            "terms": [
                {"factors": [{"name": "base", "home": name.format(users[0])}]},
                {"factors": low_rank, "members": [name.format(layer) for layer in layers]},
            ],
        }
        for name, users, layers in ((up, (0, 1, 3), (1, 3)), (gate, (1, 2), (1, 2)))
    ]
    assert [Composition.from_json(each).to_json() for each in config["compositions"]] == config["compositions"]
    small = loaded(tmp_path / "small")
    layers = small.model.layers
    assert layers[3].mlp.up_proj.parts()[0] is layers[0].mlp.up_proj.base
    assert len(layers[0].mlp.up_proj.parts()) == 1
    assert layers[2].mlp.gate_proj.parts()[0] is layers[1].mlp.gate_proj.base
    assert torch.equal(layers[0].mlp.up_proj.weight, model.get_parameter("model.layers.0.mlp.up_proj.weight"))


def test_dense_tensors_that_change_along_with_deltas_are_written(tmp_path):
    model = tiny_model("llama")
    edit, norm = Delta("up", 0, (1,), 4), "model.layers.1.post_attention_layernorm.weight"
    factored = planned(model, (edit,), tmp_path / "work")
    store(factored, "block-1", solved(factored, edit) | {norm: torch.full((32,), 0.25)})
    (tmp_path / "small").mkdir()
    write_model(factored, Recipe("by-hand"), None, tmp_path / "small")
    small = loaded(tmp_path / "small")
    assert set(small.get_parameter(norm).tolist()) == {0.25}


def test_what_is_solved_is_there_again_for_the_same_plan_alone(tmp_path):
    model, edit = tiny_model("llama"), Delta("up", 0, (1, 2), 4)
    first = carried_out(model, (edit,), tmp_path)
    again = planned(model, (edit,), tmp_path / "work")
    (unit,) = DeltaLlm().units(again.spec, (edit,))
    assert not again.has("another")
    assert "error" not in again.facts()[edit.id]
    assert again.has(unit.name)
    assert again.facts() == first.facts()
    assert first.facts()[edit.id] == {"rank": 4, "parameters": 32 * 56 + 2 * 4 * (32 + 56), "error": 0.5}
    assert all(torch.equal(again.tensor(n), first.tensor(n)) for n in names(first, edit))
    (other,) = DeltaLlm().units(again.spec, (Delta("up", 0, (1, 2), 5),))
    assert not again.has(other.name)


def test_a_delta_that_is_not_finite_is_named(tmp_path):
    model, edit = tiny_model("llama"), Delta("up", 0, (1,), 4)
    factored = planned(model, (edit,), tmp_path / "work")
    tensors = solved(factored, edit)
    tensors["model.layers.1.mlp.up_proj.up.weight"] = torch.full((56, 4), torch.nan)
    store(factored, "up", tensors)
    with pytest.raises(LayershareError, match=r"model\.layers\.1\.mlp\.up_proj\.up\.weight"):
        write_model(factored, Recipe("by-hand"), None, tmp_path)
