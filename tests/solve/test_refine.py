import copy
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import layershare
from layershare.calibrate.drivers.calls import hidden_output
from layershare.calibrate.stream import Stream
from layershare.calibrate.text import Text
from layershare.errors import LayershareError
from layershare.job import load_and_hold_out
from layershare.model.describe import describe
from layershare.model.norms import norm_parameters
from layershare.model.weights import Weights
from layershare.plan.edits import Delta, Drop, Edit, Share, places
from layershare.plan.evidence import Evidence
from layershare.plan.plan import Plan
from layershare.recipe import Recipe, Refine, make_recipe
from layershare.run import run
from layershare.solve.apply import Factored, compressed
from layershare.solve.refine import refine_blocks
from layershare.store import Store
from tests.families import tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")

SOME = {"epochs": 2, "lr": 1e-2, "batch_size": 4}


def recipe_for(folder: Path, **changes) -> Recipe:
    text = {"text": str(folder.parent / "text.txt"), "blocks": 8, "length": 64, "batch_size": 2}
    values = {"model": str(folder), "method": "basis-sharing", "keep": 0.5, "of": "targets", "calibration": text}
    effort = "closed" if changes.get("refine") is None else "blocks"
    return make_recipe({**values, "effort": effort, **changes})


@torch.no_grad()
def hidden(model: PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, ...]:
    """What leaves each block on the held-out text; of the last block, after the last norm."""
    _, text = load_and_hold_out(recipe.calibration, tokenizer, model.config)
    return model(text.tokens, output_hidden_states=True).hidden_states[1:]


def changed(before: PreTrainedModel, after: PreTrainedModel) -> set[str]:
    ours, theirs = before.state_dict(), after.state_dict()
    assert ours.keys() == theirs.keys()
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


def test_errors_fall_and_only_private_factors_change(folder, tmp_path, tokenizer):
    models, results = {}, {}
    for refine in (None, SOME):
        recipe = recipe_for(folder, refine=refine)
        results[bool(refine)] = run(recipe, tmp_path / str(bool(refine)))
        models[bool(refine)] = AutoModelForCausalLM.from_pretrained(tmp_path / str(bool(refine)))
    edits = json.loads((tmp_path / "True" / "plan.json").read_text())["edits"]
    parts = [(edit, part) for edit in edits for part in ("coef", "basis") if part == "coef" or len(edit["places"]) == 1]
    assert len(parts) < 2 * len(edits)  # some bases are shared
    spec = describe(tiny_model("llama"))
    linears = [(spec.linear(*place), part) for edit, part in parts for place in edit["places"]]
    assert changed(models[False], models[True]) == {f"model.{x.name}.{part}.weight" for x, part in linears}

    assert results[False].refine is None
    noted = results[True].refine
    assert asdict(noted.settings) == {**SOME, "norms": False}
    found = results[True].held_out
    assert noted.kept
    assert found.kl["refined"] < found.kl["refitted"]
    dense = hidden(tiny_model("llama"), recipe, tokenizer)
    before, after = (hidden(models[refine], recipe, tokenizer) for refine in (False, True))
    for layer in range(4):
        facts = noted.blocks[str(layer)]
        assert facts.error < 0.98 * facts.start
        assert facts.epoch > 0
        if layer < 3:
            error = float((dense[layer] - after[layer]).square().sum() / dense[layer].square().sum())
            assert facts.error == pytest.approx(error, rel=1e-4)
    start = float((dense[0] - before[0]).square().sum() / dense[0].square().sum())
    assert noted.blocks["0"].start == pytest.approx(start, rel=1e-4)


def test_in_memory_from_disk_and_resumed_give_the_same_bytes(folder, tmp_path, tokenizer):
    recipe = recipe_for(folder, refine={**SOME, "norms": True})
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    run(recipe, tmp_path / "memory", model=model, tokenizer=tokenizer)
    assert not changed(before, model)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())

    def stop(step: str):
        def progress(done: int, total: int) -> None:
            if step == "refine" and done == total // 2:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "stopped", announce=stop)
    assert len(list((tmp_path / "stopped" / ".run" / "refine").glob("*.safetensors"))) == 2
    run(recipe, tmp_path / "stopped")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "stopped")]
    assert weights[0] == weights[1]


def test_a_step_takes_as_many_blocks_as_it_is_told(folder, tmp_path):
    """However many of them pass through the model at once."""
    made = {}
    for a_step, at_once in ((1, 1), (1, 2), (2, 2)):
        recipe = recipe_for(folder, refine={**SOME, "batch_size": a_step})
        recipe = replace(recipe, calibration=replace(recipe.calibration, batch_size=at_once))
        out = tmp_path / f"{a_step}-{at_once}"
        run(recipe, out, pages=False)
        made[a_step, at_once] = parameters_to_vector(AutoModelForCausalLM.from_pretrained(out).parameters())
    same, other = (float((made[1, 1] - made[each]).detach().norm()) for each in ((1, 2), (2, 2)))
    assert same < 0.1 * other


def test_a_block_never_becomes_worse(folder, tmp_path):
    run(recipe_for(folder, method="svd"), tmp_path / "plain")
    results = run(recipe_for(folder, method="svd", refine={**SOME, "lr": 30.0}), tmp_path / "wild")
    assert results.refine is not None
    assert all(facts.epoch == 0 for facts in results.refine.blocks.values())
    assert not results.refine.kept
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "wild")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gemma2", "falcon"])
def test_other_families_in_half_precision(family, tokenizer, words, tmp_path):
    small = layershare.compress(
        tiny_model(family, dtype=torch.bfloat16),
        tokenizer,
        method="basis-sharing",
        keep=0.6,
        of="targets",
        text=words,
        blocks=8,
        length=32,
        effort="blocks",
        refine={**SOME, "norms": True},
        folder=tmp_path / "out",
    )
    assert small.dtype == torch.bfloat16
    blocks = json.loads((tmp_path / "out" / "results.json").read_text())["refine"]["blocks"]
    assert sum(facts["error"] < facts["start"] for facts in blocks.values()) >= 3


def factored_by_hand(model: PreTrainedModel, folder: Path, edits: tuple[Edit, ...]) -> Factored:
    """A plan carried out with random factors; the input norm of layer 1 is another one, too."""
    spec = describe(model)
    plan = Plan.from_json(layershare.make_plan(model, method="svd", keep=0.5).to_json())
    plan = Plan(**{**vars(plan), "edits": edits})
    factored = Factored(spec, plan, Weights.of(model), folder, {})
    torch.manual_seed(1)
    tensors = {"model.layers.1.input_layernorm.weight": torch.rand(32) + 0.5}
    for edit in edits:
        if isinstance(edit, Delta):
            linears = [spec.linear(edit.role, layer) for layer in edit.layers]
            anchor = spec.linear(edit.role, edit.anchor)
            tensors[f"model.{anchor.name}.base.weight"] = model.get_parameter(f"model.{anchor.name}.weight").detach()
            for x in linears:
                tensors[f"model.{x.name}.down.weight"] = torch.randn(edit.rank, x.d_in) * 0.1
                tensors[f"model.{x.name}.up.weight"] = torch.randn(x.d_out, edit.rank) * 0.1
        elif isinstance(edit, Share):
            linears = [spec.linear(*place) for place in edit.places]
            tensors[f"model.{linears[0].name}.basis.weight"] = torch.randn(edit.rank, linears[0].d_in) * 0.2
            tensors |= {f"model.{x.name}.coef.weight": torch.randn(x.d_out, edit.rank) * 0.2 for x in linears}
    factored.solved.write("by-hand", tensors)
    assert factored.has("by-hand")
    return factored


EDITS: tuple[Edit, ...] = (
    *(Delta(role, 1, (2, 3), 3) for role in ("gate", "up", "down")),
    Share(places("q", (0, 2)), 8, "input"),
    Drop("attention", (3,)),
)


def test_a_block_is_as_the_plan_makes_it(tmp_path):
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    factored = factored_by_hand(model, tmp_path, EDITS)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense.model.layers[1].input_layernorm.weight.copy_(factored.tensor("model.layers.1.input_layernorm.weight"))
        dense.model.layers[3].self_attn.o_proj.weight.zero_()
        for layer in (0, 2):
            basis, coef = (
                f"model.layers.{i}.self_attn.q_proj.{part}.weight" for i, part in ((0, "basis"), (layer, "coef"))
            )
            dense.model.layers[layer].self_attn.q_proj.weight.copy_(factored.tensor(coef) @ factored.tensor(basis))
        for layer in (2, 3):
            for role in ("gate", "up", "down"):
                name = f"mlp.{role}_proj"
                up, down = (factored.tensor(f"model.layers.{layer}.{name}.{part}.weight") for part in ("up", "down"))
                base = factored.tensor(f"model.layers.1.{name}.base.weight")
                dense.model.layers[layer].get_submodule(name).weight.copy_(base + up @ down)
    streams = [Stream(Weights.of(each), tokens(4), 2) for each in (model, dense)]
    for (layer, block), (_, expected) in zip(*streams, strict=True):
        with compressed(block, layer, factored):
            streams[0].run()
        streams[1].run()
        torch.testing.assert_close(streams[0].outputs, streams[1].outputs, msg=f"layer {layer}")
        args, kwargs = streams[0].call(0)
        with torch.no_grad():
            again = hidden_output(block(*args, **kwargs))
        assert again.shape == hidden_output(expected(*args, **kwargs)).shape
    assert not changed(before, model)
    assert all(p.requires_grad for p in model.parameters())


def test_the_method_delta_is_refined(folder, tmp_path):
    options = {"protect": 0, "unit": "both"}
    recipe = recipe_for(folder, method="delta", keep=0.8, options=options, refine={**SOME, "epochs": 3, "lr": 1e-2})
    results = run(recipe, tmp_path / "out").refine
    assert results is not None
    noted = results.blocks
    assert noted
    assert all(facts.error < 0.95 * facts.start for facts in noted.values())
    run(replace(recipe, effort="closed", refine=None), tmp_path / "plain")
    names = changed(*(AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("plain", "out")))
    assert {name.split(".")[-2] for name in names} == {"down", "up"}


@pytest.mark.parametrize("with_norms", [False, True])
def test_deltas_are_refined_and_anchors_stay(with_norms, tmp_path):
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    factored = factored_by_hand(model, tmp_path, EDITS)
    text = Text(tokens(8, 16), "random", "", "", bos=False)
    spare = replace(text, tokens=tokens(12, 16)[8:])
    evidence = Evidence(factored.spec, factored.weights, calibration=text, spare=spare, batch_size=2)
    store = Store(tmp_path / "refine", {})
    options = Refine(epochs=3, lr=1e-2, batch_size=4, norms=with_norms)
    facts = refine_blocks(factored, store, evidence, options, 0)
    assert set(facts) == {"0", "2", "3"}  # layer 1 is an anchor without a delta
    assert all(each["error"] < each["start"] for each in facts.values())
    expected = {f"model.layers.{i}.self_attn.q_proj.coef.weight" for i in (0, 2)}
    for layer in (2, 3):
        expected |= {
            f"model.layers.{layer}.mlp.{r}_proj.{p}.weight" for r in ("gate", "up", "down") for p in ("up", "down")
        }
    if with_norms:
        expected |= {f"model.layers.{i}.{name}" for i in (0, 2, 3) for name in norm_parameters(model.model.layers[i])}
    written = {name for unit in ("layer-000", "layer-002", "layer-003") for name in store.names(unit)}
    assert written == expected
    assert "layer-001" not in store
    base = factored.tensor("model.layers.1.mlp.up_proj.base.weight")
    assert torch.equal(base, model.model.layers[1].mlp.up_proj.weight)
    assert not changed(before, model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "svd", "keep": 1}, "there are no factors to train; set effort=closed"),
        ({"method": "mlp-drop", "keep": 0.8}, "'mlp-drop' makes no factors that could be trained; set effort=closed"),
    ],
)
def test_a_plan_that_shares_nothing_is_refused(changes, said, folder, tmp_path):
    with pytest.raises(LayershareError, match=said):
        run(recipe_for(folder, refine={}, **changes), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("refine", "message"),
    [({"epoch": 3}, "Unknown key in refine 'epoch'. Did you mean 'epochs'?"), ({"lr": 0}, "'refine.lr' in the recipe")],
)
def test_wrong_settings_are_refused(refine, message, folder):
    with pytest.raises(LayershareError, match=message.replace("?", r"\?")):
        recipe_for(folder, refine=refine)
