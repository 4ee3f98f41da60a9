"""DeltaLLM: plans within the budget, aligned blocks compute what they did, deltas are the optimum, runs resume."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import layershare
from layershare.errors import LayershareError
from layershare.methods import make_method, plan_with
from layershare.methods.delta import floor_rank
from layershare.model.describe import describe
from layershare.plan.budget import allowed, parse_keep
from layershare.plan.edits import Delta, Edit
from layershare.plan.plan import Plan
from layershare.recipe import make_recipe
from layershare.run import run
from tests.families import CONFIGS, tiny_model, tokens
from tests.methods.known import deep_llama, edits_of

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")
TEXT: dict[str, Any] = {"blocks": 24, "length": 32}
Compress = Callable[..., Any]


@pytest.fixture
def compress(tokenizer, words, tmp_path) -> Compress:
    """Compresses a model by an edited plan and returns it as loaded, with its results."""

    def run_it(model: PreTrainedModel, edit: Callable[[Plan], tuple[Edit, ...]] | None = None, **options: Any):
        options = {"keep": 0.9, "of": "targets", "protect": 0, **options}
        plan = layershare.make_plan(model, method="delta", **options)
        plan = plan if edit is None else replace(plan, edits=edit(plan))
        (tmp_path / "plan.json").write_text(plan.to_json())
        given = {"method": "delta", "plan": tmp_path / "plan.json", "text": words, **TEXT}
        small = layershare.compress(model, tokenizer, folder=tmp_path / "small", **given)
        return small, json.loads((tmp_path / "small" / "results.json").read_text())

    return run_it


def full_rank(model: PreTrainedModel) -> Callable[[Plan], tuple[Edit, ...]]:
    spec = describe(model)

    def edit(plan: Plan) -> tuple[Edit, ...]:
        deltas = [each for each in plan.edits if isinstance(each, Delta)]
        linears = [spec.linear(each.role, each.anchor) for each in deltas]
        return tuple(replace(e, rank=min(x.d_in, x.d_out)) for e, x in zip(deltas, linears, strict=True))

    return edit


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(tokens()).logits


def deltas(*args: Any, **options: Any) -> dict[str, Any]:
    """Role -> [(anchor, targets)] of a plan for a model with ten layers."""
    plan = layershare.make_plan(*args, method="delta", of="targets", **options)
    found: dict[str, Any] = {}
    for edit in plan.edits:
        assert isinstance(edit, Delta)
        found.setdefault(edit.role, []).append((edit.anchor, edit.layers))
    return found


@pytest.fixture(scope="module")
def ten_layers() -> Any:
    config: Any = CONFIGS["llama"]()
    config.num_hidden_layers = 10
    return config


def test_layouts(ten_layers):
    everything = {"keep": 0.75, "protect": 2}
    pairs = [(2, (3,)), (4, (5,)), (6, (7,))]
    assert deltas(ten_layers, **everything, unit="both") == dict.fromkeys(
        ("q", "k", "v", "o", "gate", "up", "down"), pairs
    )
    assert deltas(ten_layers, keep=0.85) == dict.fromkeys(("gate", "up", "down"), pairs)
    assert deltas(ten_layers, keep=0.9) == dict.fromkeys(("gate", "up", "down"), pairs[1:])
    assert deltas(ten_layers, keep=0.96) == dict.fromkeys(("gate", "up", "down"), pairs[2:])
    assert deltas(ten_layers, keep=0.98, unit="attention") == dict.fromkeys("qkvo", pairs[2:])
    runs = [(2, (3,)), (5, (6, 7))]
    assert deltas(ten_layers, keep=0.85, layout="sequential")["up"] == runs
    assert deltas(ten_layers, keep=0.85, layout="sequential", mean=True)["up"] == [(2, (2, 3)), (5, (5, 6, 7))]
    assert deltas(ten_layers, keep=0.6, protect=1, layout="sequential", span=7)["up"] == [(1, tuple(range(2, 9)))]
    assert deltas(ten_layers, keep=0.85, protect=0)["up"] == [(4, (5,)), (6, (7,)), (8, (9,))]
    assert deltas(ten_layers, keep=1) == {}


@pytest.mark.parametrize("family", CONFIGS)
def test_plans_never_exceed_their_budget_and_use_it_up_to_half_a_percent(family):
    spec = describe(CONFIGS[family]())
    for options in ({}, {"mean": True}, {"unit": "both", "layout": "sequential", "span": 3}):
        method = make_method("delta", {"protect": 0, **options})
        for keep, of in ((0.95, "targets"), (0.85, "targets"), (0.9, "all")):
            plan = plan_with(spec, "delta", method, keep, of)
            before, after = (getattr(each, of).parameters for each in (plan.before, plan.after))
            edits = [edit for edit in plan.edits if isinstance(edit, Delta)]
            linears = [spec.linear(edit.role, edit.anchor) for edit in edits]
            single = min(len(e.layers) * (x.d_in + x.d_out) for e, x in zip(edits, linears, strict=True))
            assert 0 <= keep * before - after <= max(0.005 * keep * before, single)  # tiny: a rank is more than 0.5 %
            assert all(edit.rank >= floor_rank(spec, edit.role, edit.anchor) for edit in edits)


def test_ranks_of_a_model_of_real_size():
    """The published −24 % of a model of Phi-3.5-mini's shape: the rank is near 1/32 of the width, deltas near 90 MB."""
    spec = describe(AutoConfig.for_model("phi3", pad_token_id=0))
    plan = plan_with(spec, "delta", make_method("delta"), 2.9e9 / 3.82e9, "all")
    found = [edit for edit in plan.edits if isinstance(edit, Delta)]
    assert {edit.layers for edit in found} == {(layer,) for layer in range(5, 30, 2)}
    ranks = {edit.rank for edit in found}
    assert len(ranks) == 1
    assert 96 <= ranks.pop() < 200


@pytest.mark.parametrize("family", CONFIGS)
def test_full_rank_reproduces_the_model_however_it_is_aligned(family, compress):
    model = tiny_model(family)
    small, _ = compress(model, full_rank(model), keep=0.6, unit="both", layout="sequential", span=3)
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"mean": True}, {"weighted": False}, {"align": False, "mean": True}])
def test_full_rank_reproduces_the_model_with_any_options(options, compress):
    model = tiny_model("starcoder2")  # with LayerNorms and biases everywhere
    small, results = compress(model, full_rank(model), **options)
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-3, atol=1e-4)
    assert all(each["error"] < 1e-6 for each in results["groups"].values())


def test_heads_that_their_attention_ties_together_stay_in_their_places(compress):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("diffllama", **sizes, intermediate_size=56, vocab_size=160, pad_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    small, _ = compress(model, full_rank(model), unit="attention")
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-3, atol=1e-4)


def test_heads_with_norms_of_their_own_stay_in_their_places(compress):
    config = CONFIGS["stablelm"]()
    config.qk_layernorm = True
    model = tiny_model("stablelm", config=config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm.norms" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 2)
    small, _ = compress(model, full_rank(model), unit="attention")
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-3, atol=1e-4)


def test_a_matrix_of_zeros_can_be_measured(tokenizer, words):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    small = layershare.compress(
        model, tokenizer, method="delta", layout="measured", protect=0, keep=0.9, text=words, **TEXT
    )
    assert logits(small).isfinite().all()


def test_a_plan_by_hand_for_one_matrix_is_carried_out_without_alignment(compress):
    model = tiny_model("llama")

    def one(plan: Plan) -> tuple[Edit, ...]:
        return tuple(each for each in full_rank(model)(plan) if isinstance(each, Delta) and each.role == "up")

    small, _ = compress(model, one)
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def disguise(model: Any, anchor: int, target: int) -> None:
    """Make a block a copy of another one with neurons, heads and groups in another order and other scales of norms."""
    blocks, draw = model.model.layers, torch.Generator().manual_seed(1)
    blocks[target].load_state_dict(blocks[anchor].state_dict())
    block = blocks[target]
    mlp, attention = block.mlp, block.self_attn
    order = torch.randperm(mlp.down_proj.in_features, generator=draw)
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight.copy_(linear.weight[order])
    mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
    size = 8
    queries = torch.tensor([3, 2, 0, 1])[:, None] * size + torch.arange(size)
    keys = torch.tensor([1, 0])[:, None] * size + torch.arange(size)
    attention.q_proj.weight.copy_(attention.q_proj.weight[queries.flatten()])
    attention.o_proj.weight.copy_(attention.o_proj.weight[:, queries.flatten()])
    for linear in (attention.k_proj, attention.v_proj):
        linear.weight.copy_(linear.weight[keys.flatten()])
    for norm, readers in (
        (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
    ):
        factor = torch.rand(len(norm.weight), generator=draw) + 0.5
        norm.weight.mul_(factor)
        for linear in readers:
            linear.weight.div_(factor)


@pytest.mark.parametrize("weighted", [True, False])
def test_a_block_in_disguise_is_recognised(weighted, compress):
    model = deep_llama(4)
    disguise(model, 2, 3)
    options = {"keep": 0.8, "unit": "both", "weighted": weighted}
    small, results = compress(model, **options)
    assert set(results["groups"]) == {f"{role}.02+03" for role in ("q", "k", "v", "o", "gate", "up", "down")}
    assert all(each["error"] < 1e-6 for each in results["groups"].values())
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-3, atol=1e-4)


def test_without_alignment_it_is_not(compress):
    model = deep_llama(4)
    disguise(model, 2, 3)
    small, results = compress(model, keep=0.8, unit="both", align=False)
    assert all(each["error"] > 0.1 for each in results["groups"].values())
    assert (logits(small) - logits(model)).abs().max() > 0.1


def test_measured_pairs_are_those_that_differ_least(evidence):
    model = deep_llama(7)
    disguise(model, 1, 3)
    disguise(model, 4, 5)
    measured = evidence(model)
    found = edits_of(measured, "delta", 0.8, layout="measured", protect=0, unit="both")
    pairs = {tuple(sorted([edit.anchor, *edit.layers])) for edit in found if isinstance(edit, Delta)}
    assert pairs == {(1, 3), (4, 5)}
    near = edits_of(measured, "delta", 0.93, layout="measured", protect=0, span=1)
    assert {tuple(sorted([edit.anchor, *edit.layers])) for edit in near if isinstance(edit, Delta)} == {(4, 5)}


@pytest.mark.parametrize("weighted", [True, False])
def test_deltas_are_the_optimum_on_the_target_s_inputs(weighted, compress, evidence):
    model: Any = tiny_model("llama", dtype=torch.float64)
    small, results = compress(model, align=False, weighted=weighted)
    measured = evidence(model)
    layers, made = model.model.layers, small.model.layers
    for role, linear in (("up", "mlp.up_proj"), ("down", "mlp.down_proj")):
        anchor, target, ours = (
            each.get_submodule(linear).weight.detach().T for each in (layers[2], layers[3], made[3])
        )
        assert torch.equal(made[2].get_submodule(linear).weight.T, anchor)
        rank = results["groups"][f"{role}.02+03"]["rank"]
        root = torch.eye(len(anchor), dtype=torch.float64)
        if weighted:
            gram = measured.stats.gram(measured.spec.linear(role, 3)).double()
            root = torch.linalg.cholesky(gram, upper=True)
        u, values, vh = torch.linalg.svd(root @ (target - anchor), full_matrices=False)
        best = torch.linalg.solve(root, (u[:, :rank] * values[:rank]) @ vh[:rank])
        torch.testing.assert_close(ours - anchor, best, rtol=1e-3, atol=1e-5)
        error = values[rank:].square().sum() / (root @ target).square().sum()
        assert results["groups"][f"{role}.02+03"]["error"] == pytest.approx(float(error), rel=1e-3)


def test_random_deltas_start_from_the_anchor_s_weights(compress):
    model: Any = tiny_model("gpt2")
    small, _ = compress(model, init="random", align=False)
    for name in ("c_fc", "c_proj"):
        ours = getattr(small.transformer.h[3].mlp, name)
        assert torch.equal(ours.weight, getattr(model.transformer.h[2].mlp, name).weight)
        assert torch.count_nonzero(ours.up.weight) == 0
        assert 0.5 < ours.down.weight.std() * ours.in_features**0.5 < 2


def test_a_mean_has_deltas_on_both_sides(compress):
    model: Any = tiny_model("llama")
    small, _ = compress(model, mean=True, weighted=False, align=False)
    up = [layer.mlp.up_proj for layer in small.model.layers[2:]]
    mean = (model.model.layers[2].mlp.up_proj.weight + model.model.layers[3].mlp.up_proj.weight) / 2
    torch.testing.assert_close(up[0].base.weight, mean)
    assert all(torch.count_nonzero(each.up.weight) for each in up)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "With protect=2, no two blocks .* of this model's 4; protect fewer"),
        ({"layout": "measured"}, "With protect=2, no two blocks"),
        ({"protect": 0, "keep": 0.5}, r"leave at least 6\d\.\d% of the targets \(.* parameters\); .*unit=both"),
        ({"protect": 0, "keep": 0.3, "layout": "measured"}, "leave at least"),
        ({"span": 0}, "Option 'span' of delta"),
        ({"unit": "block"}, "Option 'unit' of delta"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(options, message):
    spec = describe(CONFIGS["llama"]())
    keep = {"keep": 0.9, **options}["keep"]
    options = {name: value for name, value in options.items() if name != "keep"}
    with pytest.raises(LayershareError, match=message):
        make_method("delta", options).require(spec, allowed(spec, parse_keep(keep), "targets"))


def test_deltas_need_their_method(tokenizer, words, tmp_path):
    model = tiny_model("llama")
    plan = layershare.make_plan(model, method="delta", keep=0.9, protect=0)
    (tmp_path / "plan.json").write_text(replace(plan, method="svd", options={}).to_json())
    with pytest.raises(LayershareError, match=r"The plan has deltas, .* such as 'delta'"):
        layershare.compress(model, tokenizer, plan=tmp_path / "plan.json", text=words, **TEXT)


class _Killed(Exception):
    pass


def test_interrupted_and_in_memory_runs_give_the_same_bits(tmp_path, tokenizer, words):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n".join(words))
    calibration = {"text": str(tmp_path / "text.txt"), "batch_size": 2, **TEXT}
    options = {"protect": 0, "layout": "measured"}
    values = {"model": str(tmp_path / "dense"), "method": "delta", "options": options, "keep": 0.85}
    recipe = make_recipe({**values, "calibration": calibration})
    run(recipe, tmp_path / "whole")

    def announce(step: str):
        def progress(done: int, total: int) -> None:
            if step == "solve" and done:
                raise _Killed

        return progress

    with pytest.raises(_Killed):
        run(recipe, tmp_path / "killed", announce=announce)
    assert len(list((tmp_path / "killed" / ".run" / "units").glob("*.safetensors"))) == 1
    run(recipe, tmp_path / "killed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    run(recipe, tmp_path / "memory", model=loaded, tokenizer=tokenizer)
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == expected
    assert (tmp_path / "memory" / "model.safetensors").read_bytes() == expected
