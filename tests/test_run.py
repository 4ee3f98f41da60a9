import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import layershare
from layershare.calibrate.text import load_text
from layershare.device import device_of
from layershare.errors import LayershareError
from layershare.folders import WORK, work_folder
from layershare.job import load_and_hold_out
from layershare.methods import make_method, plan_with
from layershare.methods.probe import Probe
from layershare.model.describe import describe
from layershare.model.layers import ComposedLinear
from layershare.plan.edits import Place, Quantize, Share, quantized
from layershare.plan.plan import Plan
from layershare.progress import no_progress
from layershare.recipe import Calibration, Recipe, make_recipe
from layershare.report.results import Results, read_as
from layershare.run import run
from layershare.store import MANIFEST, Store, as_json
from tests.families import tiny_model, tokens

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")


SECOND_FACTORS = (
    *(f"{role}_proj.coef.weight" for role in ("q", "k", "v", "gate", "up")),
    *(f"{role}_proj.basis.weight" for role in ("o", "down")),
)


METHODS = ("basis-sharing", "auto")
"""With a refit to the compressed inputs alone, and with one that follows the original."""


def recipe_for(folder: Path, **changes) -> Recipe:
    values = {
        "model": str(folder),
        "method": "basis-sharing",
        "keep": 0.5,
        "of": "targets",
        "max_shard_size": "40KB",
        "calibration": {"text": str(folder.parent / "text.txt"), "blocks": 16, "length": 64, "batch_size": 2},
    }
    return make_recipe(values | changes)


def weights_of(folder: Path) -> dict[str, bytes]:
    """Every file but those that hold durations and the date, or their checksums."""
    timed = ("results.json", "report.html", MANIFEST)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in timed}


@pytest.mark.parametrize("method", METHODS)
def test_from_disk_and_in_memory_give_the_same_bits(folder, tmp_path, method):
    tokenizer, recipe = AutoTokenizer.from_pretrained(folder), recipe_for(folder, method=method)
    run(recipe, tmp_path / "disk")
    run(recipe, tmp_path / "memory", model=tiny_model("llama"), tokenizer=tokenizer)
    disk, memory = weights_of(tmp_path / "disk"), weights_of(tmp_path / "memory")
    assert disk.keys() == memory.keys()
    assert sum(name.endswith(".safetensors") for name in disk) > 3
    assert [name for name in disk if disk[name] != memory[name]] == []


def test_refit_fits_coefficients_to_the_inputs_that_the_compressed_model_really_has(folder, tokenizer, tmp_path, words):
    models = {}
    for chosen in (False, True):
        run(recipe_for(folder, refit=chosen), tmp_path / str(chosen))
        models[chosen] = AutoModelForCausalLM.from_pretrained(tmp_path / str(chosen))
    before, after = (models[chosen].state_dict() for chosen in (False, True))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # A basis is fixed in a refit; of a private pair on the output side it is the second factor and is fitted.
    assert changed == {name for name in before if name.endswith(SECOND_FACTORS)}

    text = load_text(str(tmp_path / "text.txt"), tokenizer, split="train", blocks=16, length=64)
    for name in ("model.layers.3.self_attn.q_proj", "model.layers.2.self_attn.v_proj"):
        inputs = []
        module = models[True].get_submodule(name)
        hook = module.register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            models[True](text.tokens)
        hook.remove()
        x = torch.cat(inputs).double()
        basis, coef = (factor.weight.T for factor in module.parts())
        weight = tiny_model("llama").get_parameter(f"{name}.weight").T
        expected = torch.linalg.lstsq(x @ basis.double(), x @ weight.double()).solution
        torch.testing.assert_close(coef.double(), expected, rtol=0, atol=1e-3)
        assert not torch.allclose(before[f"{name}.coef.weight"].T.double(), expected, rtol=0, atol=1e-3)


def test_results_say_where_they_come_from(folder, tmp_path, words):
    (tmp_path / "other.txt").write_text("\n".join(reversed(words)))
    recipe = recipe_for(folder, evaluation={"text": str(tmp_path / "other.txt"), "blocks": 2})
    results = as_json(run(recipe, tmp_path / "out"))
    file = tmp_path / "out" / "results.json"
    assert results == json.loads(file.read_text()) == as_json(read_as(Results, file))
    assert results["versions"]["torch"] == torch.__version__
    assert results["machine"]["cores"]
    assert results["calibration"]["seed"] == 2023
    assert len(results["calibration"]["tokens_sha256"]) == 64
    assert results["after"]["targets"]["parameters"] <= 0.5 * results["before"]["targets"]["parameters"]
    assert set(results["seconds"]) == {"calibrate", "solve", "refit", "write", "evaluate"}
    for name in ("q.00-01", "o.00"):
        group = results["groups"][name]
        assert 0 < group["error"] < 1
        assert group["spectrum"]["index"] == list(range(1, 33))
    # The spectrum is whole: what the components after the cut hold is the error, that of a matrix on its own.
    assert sum(group["spectrum"]["share"][group["rank"] :]) == pytest.approx(group["error"], rel=1e-3)
    assert results["shapes"]["k"] == [[32, 16]] * 4
    assert [set(sample) for sample in results["samples"]] == [{"prompt", "model", "original"}] * 2


def test_statistics_are_shared_by_methods_and_sizes(folder, tmp_path):
    stats = {**vars(recipe_for(folder).calibration), "stats": str(tmp_path / "stats")}
    run(recipe_for(folder, calibration=stats), tmp_path / "a")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "stats").rglob("*.safetensors")}
    assert len(times) == 4
    run(recipe_for(folder, calibration=stats, method="svd-llm", keep=0.7), tmp_path / "b")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "stats").rglob("*.safetensors")} == times


def test_a_finished_run_is_not_repeated_and_another_recipe_is_refused(folder, tmp_path):
    first = run(recipe_for(folder), tmp_path / "out")
    with pytest.warns(UserWarning, match="nothing was done"):
        assert run(recipe_for(folder), tmp_path / "out") == first
    with pytest.raises(LayershareError, match="a finished run of another recipe"):
        run(recipe_for(folder, keep=0.6), tmp_path / "out")


def test_a_finished_run_of_another_model_in_memory_is_not_taken_for_ours(tmp_path, tokenizer, words):
    options = {"method": "svd", "folder": tmp_path / "out"}
    layershare.compress(tiny_model("llama"), **options)
    with pytest.warns(UserWarning, match="nothing was done"):
        layershare.compress(tiny_model("llama"), **options)
    with pytest.raises(LayershareError, match="a finished run of another model"):
        layershare.compress(tiny_model("llama", seed=1), **options)


def test_a_finished_run_measured_on_a_text_that_has_changed_is_refused(folder, tmp_path, words):
    test = tmp_path / "test.txt"
    test.write_text("\n".join(words))
    recipe = recipe_for(folder, method="svd", evaluation={"text": str(test), "length": 32, "blocks": 4})
    run(recipe, tmp_path / "out")
    with pytest.warns(UserWarning, match="nothing was done"):
        run(recipe, tmp_path / "out")
    test.write_text("\n".join(reversed(words)))
    with pytest.raises(LayershareError, match=r"test.txt' has changed since the finished run"):
        run(recipe, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:The text 'strings' has")
@pytest.mark.parametrize(
    ("wanted", "held_out", "found"),
    [
        (20, 4, (20, 4)),
        (100, 4, (96, 4)),
        (100, 16, (88, 12)),
        (98, 16, (88, 12)),
        (90, 16, (88, 12)),
        (86, 16, (86, 14)),
    ],
)
def test_blocks_that_are_held_out(wanted, held_out, found, tokenizer):
    """Of a text of 100 blocks: as many as are asked for, of one that is too short for all at most an eighth, or more
    where calibration leaves more."""
    options = Calibration(blocks=wanted, length=12, held_out=held_out)
    calibration, spare = load_and_hold_out(options, tokenizer, tiny_model("llama").config, ["ab" * 600])
    assert (len(calibration.tokens), len(spare.tokens)) == found


def test_a_finished_run_is_not_taken_for_that_of_what_has_changed_since(folder, tmp_path, words):
    run(recipe_for(folder), tmp_path / "out")
    text = folder.parent / "text.txt"
    before = text.read_text()
    text.write_text("\n".join(reversed(words)))
    with pytest.raises(LayershareError, match="has changed since the finished run"):
        run(recipe_for(folder), tmp_path / "out")
    text.write_text(before)
    with pytest.warns(UserWarning, match="nothing was done"):
        run(recipe_for(folder), tmp_path / "out")
    tiny_model("llama", seed=1).save_pretrained(folder)
    with pytest.raises(LayershareError, match="a finished run of another model"):
        run(recipe_for(folder), tmp_path / "out")


def test_an_option_that_no_recipe_could_hold_is_refused_before_anything_is_written(folder, tmp_path):
    recipe = replace(recipe_for(folder), options={"group_size": torch.tensor(2)})
    with pytest.raises(LayershareError, match="Option 'group_size' of basis-sharing"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_plan_foretells_is_not_told_of_an_edited_one(folder, tmp_path):
    run(recipe_for(folder, method="auto", options={"compare": False}, refit=False), tmp_path / "out", pages=False)
    file, spec = tmp_path / "out" / "plan.json", describe(tiny_model("llama"))
    plan = Plan.read(file, spec)
    assert plan.predicted_loss is not None
    first, *others = plan.edits
    assert isinstance(first, Share)
    assert Plan.read(file, spec.stored_as({}, torch.float64)).predicted_loss == plan.predicted_loss
    file.write_text(replace(plan, edits=(replace(first, rank=1), *others)).to_json())
    assert Plan.read(file, spec).predicted_loss is None


def test_the_tokenizer_of_a_nameless_model_is_not_guessed(words):
    with pytest.raises(LayershareError, match="its tokenizer is not known"):
        layershare.compress(tiny_model("gpt2"), text=words)  # there is a model 'gpt2' on the hub


def test_measuring_on_the_calibration_text_warns(folder, tmp_path):
    text = recipe_for(folder).calibration.text
    with pytest.warns(UserWarning, match="the very text that it is compressed for"):
        run(recipe_for(folder, evaluation={"text": text, "blocks": 2}), tmp_path / "out")


def test_an_unfinished_run_of_another_recipe_and_a_full_folder_are_refused(folder, tmp_path):
    work = tmp_path / "out" / WORK
    work.mkdir(parents=True)
    (work / "recipe.yaml").write_text("model: other\n")
    with pytest.raises(LayershareError, match="an unfinished run of another recipe"):
        run(recipe_for(folder), tmp_path / "out")
    shutil.rmtree(work)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(LayershareError, match="is not empty"):
        run(recipe_for(folder), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
    with pytest.raises(LayershareError, match="is a file"):
        run(recipe_for(folder), tmp_path / "text.txt")


def test_a_run_killed_before_it_wrote_its_recipe_can_be_started_again(folder, tmp_path):
    (tmp_path / "out" / WORK).mkdir(parents=True)
    (tmp_path / "out" / WORK / "lock").touch()
    run(recipe_for(folder, method="svd"), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("others", [[], ["stats"]])
def test_a_failed_run_takes_nothing_with_it_that_is_not_its_own(others, tmp_path):
    def fail(work: Path):
        for name in others:  # of this run or of another one that began in the meantime
            (work.parents[1] / name).mkdir()
        raise RuntimeError("too early")

    with pytest.raises(RuntimeError, match="too early"), work_folder(tmp_path / "new" / "a", "model: a\n") as work:
        fail(work)
    assert [path.name for path in tmp_path.rglob("*")] == (["new", *others] if others else [])


def test_a_full_disk_is_noticed_before_anything_is_written(folder, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(LayershareError, match="where 1 kB are free"):
        run(recipe_for(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "mka", "keep": 0.8}, "at least 16 blocks"),
        ({"method": "shortgpt", "keep": 0.1, "of": "targets"}, "Leaving out layers alone"),
        ({"method": "mlp-drop", "keep": 0.1, "of": "targets"}, "Leaving out layers alone"),
        ({"method": "mka", "keep": 0.1, "of": "targets"}, "Merging layers alone"),
        ({"method": "laco", "keep": 0.4, "of": "targets", "options": {"merged": 2}}, "Merging layers alone"),
        ({"method": "asvd", "keep": 0.4, "of": "targets", "options": {"ratios": 1}}, "set a higher 'ratios'"),
        ({"method": "bolaco", "keep": 0.05, "of": "targets"}, "leaves v dense"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_measured(changes, message, folder, tmp_path):
    steps = []

    def announce(step):
        steps.append(step)
        return lambda done, total: None

    recipe = recipe_for(folder, **changes)
    recipe = replace(recipe, calibration=replace(recipe.calibration, blocks=8))
    with pytest.raises(LayershareError, match=message):
        run(recipe, tmp_path / "out", announce=announce)
    assert not steps
    assert not (tmp_path / "out").exists()


def test_damaged_factors_are_solved_again(tmp_path):
    store = Store(tmp_path, {"model": "m"})
    store.write("a", {"x": torch.ones(3)}, {"error": 0.5})
    store.write("b", {"x": torch.zeros(3)})
    (tmp_path / "a.safetensors").write_bytes(b"short")
    again = Store(tmp_path, {"model": "m"})
    assert ("a" in again, "b" in again, "c" in again) == (False, True, False)
    with pytest.raises(LayershareError, match="missing or damaged"):
        again.read("a", "x")
    again.write("a", {"x": torch.ones(3)}, {"error": 0.5})
    assert torch.equal(Store(tmp_path, {"model": "m"}).read("a", "x"), torch.ones(3))
    assert "b" not in Store(tmp_path, {"model": "another"})
    (tmp_path / "manifest.json").write_text('{"identity": ')
    assert "b" not in Store(tmp_path, {"model": "m"})


@pytest.mark.parametrize("method", METHODS)
def test_killed_runs_continue_to_the_same_bits(folder, tmp_path, commands, method):
    (tmp_path / "recipe.yaml").write_text(recipe_for(folder, method=method, options={}).to_yaml())
    done = subprocess.run(
        [commands / "python", "-m", "tests.killed_runs", "recipe.yaml", "killed", "whole", "6", "0"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "src"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {"units", "refit", "model"} <= set(done.stdout.split())  # the kills came in the middle of the work
    killed, whole = weights_of(tmp_path / "killed"), weights_of(tmp_path / "whole")
    assert killed.keys() == whole.keys()
    assert [name for name in whole if whole[name] != killed[name]] == []


def test_a_hand_edited_plan_with_a_shared_output_side(folder, tmp_path):
    model = tiny_model("llama")
    plan = json.loads(layershare.make_plan(model, method="basis-sharing", keep=0.5, of="targets").to_json())
    plan["edits"] = [
        {"places": [["o", 0], ["o", 2], ["o", 3]], "rank": 20, "side": "output"},
        {"places": [["q", 1]], "rank": 9, "side": "output"},
        {"places": [["gate", 0], ["gate", 1], ["gate", 2], ["gate", 3]], "rank": 20, "side": "input"},
    ]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    results = run(recipe_for(folder, plan=str(tmp_path / "plan.json"), refit=True), tmp_path / "out")
    assert results.refit
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in small.parameters()) == results.after.all.parameters
    base = small.model.layers
    assert base[2].self_attn.o_proj.parts()[1] is base[0].self_attn.o_proj.basis
    with torch.no_grad():
        assert small(tokens()).logits.isfinite().all()


def test_a_refit_beside_deltas_leaves_these_as_they_are(folder, tmp_path):
    plan = json.loads(layershare.make_plan(tiny_model("llama"), method="svd", keep=0.5, of="targets").to_json())
    share = {"kind": "share", "places": [["q", 0], ["q", 1]], "rank": 9, "side": "input"}
    plan["edits"] = [share, {"kind": "delta", "role": "up", "anchor": 0, "layers": [1], "rank": 4}]
    plan["method"], plan["options"] = "delta", {}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    made = {}
    for refit in (False, True):
        recipe = recipe_for(folder, method="delta", plan=str(tmp_path / "plan.json"), refit=refit)
        assert run(recipe, tmp_path / str(refit)).refit == refit
        made[refit] = AutoModelForCausalLM.from_pretrained(tmp_path / str(refit)).state_dict()
    changed = {name for name in made[True] if not torch.equal(made[True][name], made[False][name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.coef.weight" for layer in (0, 1)}
    plan["edits"] = plan["edits"][1:]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(LayershareError, match="no low-rank factors that could be fitted again"):
        run(recipe, tmp_path / "out")  # pyright: ignore[reportPossiblyUnboundVariable]
    plan["method"] = "basis-sharing"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(LayershareError, match=r"The plan has deltas, .* such as 'delta'"):
        run(recipe_for(folder, plan=str(tmp_path / "plan.json")), tmp_path / "out")


@pytest.mark.parametrize("method", METHODS)
def test_a_refit_that_is_resumed_goes_on_from_the_refitted_layers(folder, tmp_path, method):
    whole = recipe_for(folder, method=method, refit=True)
    run(whole, tmp_path / "whole")

    def stop(step: str):
        def progress(done: int, total: int) -> None:
            if step == "refit" and done == 2:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        run(whole, tmp_path / "stopped", announce=stop)
    run(whole, tmp_path / "stopped")
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "whole")


def test_a_search_that_is_done_is_not_repeated(folder, tmp_path, monkeypatch):
    recipe = recipe_for(folder, method="laco", keep=0.8, options={"merged": 2, "samples": 1})

    def stop(step):
        if step == "solve":
            raise RuntimeError("stopped")
        return lambda done, total: None

    with pytest.raises(RuntimeError, match="stopped"):
        run(recipe, tmp_path / "out", announce=stop)
    (plan,) = (tmp_path / "out" / WORK).glob("plan-*.json")
    edits = json.loads(plan.read_text())["edits"]
    monkeypatch.delattr(Probe, "final_states")
    run(recipe, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["edits"] == edits != []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_is_stored_in_the_dtype_that_is_asked_for(folder, tmp_path, dtype):
    results = run(recipe_for(folder, method="svd", store_dtype=dtype), tmp_path / "out")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert small.dtype == getattr(torch, dtype)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert size == pytest.approx(results.after.all.bytes, rel=0.01)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_a_run_leaves_alone_is_not_rounded(tokenizer, tmp_path, dtype, stored):
    model = tiny_model("llama", dtype=stored)
    with torch.no_grad():
        model.model.norm.weight.fill_(2.0**-20)  # which float16 holds with fewer digits
        model.model.norm.weight[0] *= 1 + 2**-7
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    run(recipe_for(tmp_path / "dense", method="svd", dtype=dtype), tmp_path / "out")
    before, after = (
        {name: tensor for path in (tmp_path / where).glob("*.safetensors") for name, tensor in load_file(path).items()}
        for where in ("dense", "out")
    )
    same = {name for name in before.keys() & after.keys() if len(after[name])}  # but for the guard
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= same
    for name in same:
        assert after[name].dtype == stored
        assert torch.equal(after[name], before[name])


def test_tensors_keep_the_dtypes_that_they_really_have(tokenizer, words):
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.model.norm.float()
    small = layershare.compress(model, method="svd", keep=0.8)
    assert small.model.layers[0].mlp.up_proj.coef.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(small.model.norm.weight.float(), model.model.norm.weight)


def test_a_checkpoint_that_contradicts_its_config_on_tied_weights_is_refused(tmp_path):
    model = tiny_model("gemma")
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with pytest.raises(LayershareError, match="tie_word_embeddings = False, save the model"):
        layershare.compress(model, method="svd", folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_blocks_longer_than_the_context_and_unknown_devices_are_refused(folder, tmp_path):
    with pytest.raises(LayershareError, match="Blocks of 4096 tokens do not fit: this model takes 2 to 128"):
        run(recipe_for(folder, calibration={"length": 4096}), tmp_path / "out")
    for device in ("gpu9", "cpu:99", "cpu:-1", "cpu:", "meta", "mkldnn", ""):
        with pytest.raises(LayershareError, match=f"There is no device '{device}'"):
            run(recipe_for(folder, device=device), tmp_path / "out")
    assert device_of("cpu:0") == "cpu"
    assert not (tmp_path / "out").exists()


def test_a_plan_without_edits_is_refused(folder, tmp_path):
    plan = layershare.make_plan(tiny_model("llama"), method="svd", keep=0.7)
    (tmp_path / "plan.json").write_text(replace(plan, edits=()).to_json())
    with pytest.raises(LayershareError, match="has no edits"):
        run(recipe_for(folder, plan=str(tmp_path / "plan.json")), tmp_path / "out")


def test_values_of_other_kinds_in_python(tokenizer, words):
    wrongs: list[dict[str, Any]] = [{"keep": True}, {"blocks": "x"}, {"seed": True}, {"refine": {"lr": 1e38}}]
    for wrong in [*wrongs, dict[str, Any](group_size=True)]:
        with pytest.raises(LayershareError, match="Input should be"):
            layershare.compress(tiny_model("llama"), tokenizer, method="basis-sharing", text=words, **wrong)


def test_a_plan_is_carried_out_with_the_method_that_it_names(folder, tmp_path):
    plan = layershare.make_plan(tiny_model("llama"), method="svd", keep=0.7, of="targets")
    (tmp_path / "plan.json").write_text(plan.to_json())
    said = {"method": "svd", "keep": 0.7, "plan": str(tmp_path / "plan.json")}
    recipe = recipe_for(folder, **said)
    results = run(recipe, tmp_path / "out")
    assert (results.method, results.keep, results.calibration) == ("svd", 0.7, None)
    with pytest.warns(UserWarning, match="nothing was done"):
        run(recipe, tmp_path / "out")
    with pytest.raises(LayershareError, match="carried out with the options that it names"):
        run(recipe_for(folder, **said, options={"pivot": True}), tmp_path / "other")
    for name, other in (("method", "welore"), ("keep", 0.5)):
        with pytest.raises(LayershareError, match=f"plan.json' is made with {name}=.*; leave {name}={other} out"):
            run(recipe_for(folder, **said | {name: other}), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    (tmp_path / "plan.json").write_text(replace(plan, edits=plan.edits[1:]).to_json())
    with pytest.raises(LayershareError, match="has changed since the finished run"):
        run(recipe, tmp_path / "out")


def test_a_basis_may_have_more_rank_than_each_of_its_matrices_alone(folder, tmp_path):
    text = {"text": str(folder.parent / "text.txt"), "blocks": 8, "length": 64}
    options = {"shared": ["v"], "group_size": 4}
    values = {"model": str(folder), "method": "basis-sharing", "options": options, "keep": 0.9, "of": "targets"}
    run(make_recipe({**values, "refit": True, "calibration": text}), tmp_path / "out")
    plan = Plan.from_file(tmp_path / "out" / "plan.json")
    ranks = {edit.rank for edit in plan.edits if isinstance(edit, Share) and edit.roles == ("v",)}
    assert max(ranks) > describe(tiny_model("llama")).linear("v", 0).d_out


class Stopped(Exception):
    """What a run is stopped by."""


def test_ranks_and_bits_are_planned_together_and_stored(folder, tmp_path):
    """Every byte as planned; the model that is loaded is the one that was measured; stopped, it ends at the same."""
    recipe = recipe_for(folder, method="auto", keep=0.15, options={"bits": "3,4,8"}, max_shard_size="5GB")
    for last in ("compare", "quantize"):
        steps: list[str] = []

        def stop(step: str, last: str = last, steps: list[str] = steps):
            steps.append(step)
            if step == last:
                raise Stopped
            return no_progress

        with pytest.raises(Stopped):
            run(recipe, tmp_path / "stopped", announce=stop)
    assert steps == ["calibrate", "plan", "solve", "refit", "compare", "quantize"]
    run(recipe, tmp_path / "stopped")
    results = run(recipe, tmp_path / "whole")
    whole = weights_of(tmp_path / "whole")
    assert weights_of(tmp_path / "stopped") == whole

    assert results.after.targets.bytes <= 0.15 * results.before.targets.bytes
    assert results.after.all.bytes == len(whole["model.safetensors"])
    assert results.held_out is not None
    assert results.held_out.kl.keys() == {"own", "refitted", "bits alone"}
    edits = quantized(Plan.from_file(tmp_path / "whole" / "plan.json").edits)
    small: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    layers = {name: x for name, x in small.base_model.named_modules() if isinstance(x, ComposedLinear)}
    spec = describe(tiny_model("llama"))
    assert len(edits) > 1
    for place, edit in edits.items():
        storages = [factor.storage for factor in layers[spec.linear(*place).name].composition.factors]
        assert {edit.bits, edit.basis_bits} >= {storage and storage.bits for storage in storages}
    layershare.verify(tmp_path / "whole")


def test_what_is_measured_of_integers_is_what_is_loaded(tmp_path, tokenizer, words):
    """A Conv1D model, from disk: KL on the held-out blocks, by the stream and by the model that was written."""
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n".join(words))
    recipe = recipe_for(tmp_path / "dense", method="auto", keep=0.2, options={"bits": [3, 8]})
    results = run(recipe, tmp_path / "out")
    small: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    _, held_out = load_and_hold_out(recipe.calibration, tokenizer, model.config)
    with torch.no_grad():
        p, q = (torch.log_softmax(x(held_out.tokens).logits[:, :-1], -1) for x in (model, small))
    assert results.held_out is not None
    taken = "refitted" if results.refit else results.held_out.chosen
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(results.held_out.kl[taken], rel=1e-3)


def test_a_plan_of_another_method_can_be_stored_in_few_bits(folder, tmp_path):
    """Written by hand: bases that layers share, matrices that stay whole; the rest of the plan as it was."""
    spec = describe(tiny_model("llama"))
    plan = plan_with(spec, "basis-sharing", make_method("basis-sharing"), 0.5, "targets")
    share = next(edit for edit in plan.edits if isinstance(edit, Share) and len(edit.places) == 2)
    edits = (share, Quantize(share.places, 4, 8), Quantize((Place("down", 3),), 3, 3))
    (tmp_path / "plan.json").write_text(replace(plan, edits=edits).to_json())
    recipe = recipe_for(folder, plan=str(tmp_path / "plan.json"), max_shard_size="5GB")
    results = run(recipe, tmp_path / "out")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    name = spec.linear(*share.places[0]).name
    assert state[f"model.{name}.basis.codes"].dtype == torch.int8
    assert state[f"model.{name}.coef.codes"].dtype == torch.uint8
    assert state[f"model.{spec.linear('down', 3).name}.base.codes"].shape == (32, 3 * spec.linear("down", 3).d_in // 8)
    assert results.after.all.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
