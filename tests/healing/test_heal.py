import json
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from layershare.errors import LayershareError
from layershare.healing.job import prepare_healing
from layershare.healing.objective import Objective
from layershare.healing.parameters import choose, lora_targets, merge
from layershare.healing.settings import Lora
from layershare.healing.trainer import HealTrainer, Ordered, last_checkpoint
from layershare.healing.watch import held_out_loss
from layershare.model.hub import load
from layershare.model.layers import ComposedLinear
from layershare.store import MANIFEST
from tests.families import tiny_model, tokens
from tests.healing.tiny import changed, compress_tiny, heal, job, results_of, settings, text_for, weights

FACTORS = (".coef.weight", ".basis.weight")
NORMS = ("norm.weight",)


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({"train": "factors"}, FACTORS),
        ({"train": "norms"}, NORMS),
        ({"train": "factors", "norms": True}, FACTORS + NORMS),
        ({"train": "full"}, ("",)),
        ({"train": "lora"}, (".coef.weight",)),
        ({"train": "lora", "lora": {"targets": "factors"}, "norms": True}, FACTORS + NORMS),
        (
            {"train": "lora", "lora": {"targets": ["q_proj", "down_proj"]}},
            ("q_proj.coef.weight", "down_proj.coef.weight"),
        ),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_what_should_train_does_and_all_else_keeps_its_bits(small, tmp_path, changes, trained):
    done = heal(small, tmp_path / "out", **changes)
    every = {name for name, tensor in weights(small).items() if tensor.numel()}
    assert changed(small, tmp_path / "out") == {name for name in every if name.endswith(trained)}
    counted = sum(weights(small)[name].numel() for name in every if name.endswith(trained))
    if changes["train"] != "lora":
        assert done["needs"]["trained"] == counted


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({"train": "factors"}, FACTORS),
        ({"train": "full"}, ("weight",)),
        ({"train": "lora", "lora": {"targets": "coefficients"}}, (".coef.weight",)),
        ({"train": "lora", "lora": {"targets": "factors"}}, FACTORS),
    ],
    ids=["factors", "full", "coefficients", "factors-by-lora"],
)
def test_pivoted_bases_train_and_keep_their_pivots(tmp_path, tokenizer, words, changes, trained):
    small = compress_tiny(tmp_path, tokenizer, words, options={"pivot": True})
    done = heal(small, tmp_path / "out", **changes)
    every = {name for name, tensor in weights(small).items() if tensor.numel()}
    assert any(name.endswith(".basis_order") for name in every)
    assert changed(small, tmp_path / "out") == {name for name in every if name.endswith(trained)}
    assert done["log"][-1]["train_loss"] < 10


def test_a_shared_basis_gets_the_sum_of_its_members_gradients(small):
    shared, alone = load(small), load(small)
    members = {}
    for name, module in list(alone.named_modules()):
        if isinstance(module, ComposedLinear):
            basis = torch.nn.Linear(1, 1, bias=False)
            (shared_part,) = (part for part, f in zip(module.parts(), module.factors, strict=True) if f.home)
            basis.weight = torch.nn.Parameter(shared_part.weight.detach().clone())
            module._home = (SimpleNamespace(basis=basis),)  # pyright: ignore[reportAttributeAccessIssue]
            module.basis = basis
            members[name] = basis.weight
    objective = Objective(settings(small).loss, shared, None)
    for model in (shared, alone):
        objective(model, tokens(), torch.arange(2))[0].backward()
    for module in shared.modules():
        if isinstance(module, ComposedLinear) and not module._home:
            own = module.basis.weight  # pyright: ignore[reportAttributeAccessIssue]
            users = [n for n, m in shared.named_modules() if isinstance(m, ComposedLinear) and module in (m, *m._home)]
            total = torch.stack([members[each].grad for each in users]).sum(0)  # pyright: ignore
            torch.testing.assert_close(own.grad, total)
            assert len(users) in (1, 2)


def test_deltas_train_alone(shared, tmp_path):
    done = heal(shared, tmp_path / "out", train="deltas", loss={"kind": "both"}, replace={})
    every = weights(shared)
    expected = {name for name in every if name.endswith((".down.weight", ".up.weight"))}
    assert expected
    assert changed(shared, tmp_path / "out") == expected
    assert done["needs"]["trained"] == sum(every[name].numel() for name in expected)
    probabilities = [entry["replacement"] for entry in done["log"] if "replacement" in entry]
    assert probabilities == sorted(probabilities)
    assert probabilities[-1] == 1


def test_deltas_have_coefficients_and_names(shared):
    inside = {"coefficients": (".up",), "factors": (".up", ".down", ".base"), ("up_proj",): (".up_proj.up",)}
    for on, ends in inside.items():
        targets = lora_targets(load(shared), Lora(targets=on))  # pyright: ignore[reportArgumentType]
        assert {end for end in ends if any(name.endswith(end) for name in targets)} == set(ends)


def test_merged_adapters_keep_logits_and_sharing(small):
    model = choose(load(small), settings(small, lora={"targets": "factors"}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        adapted = model.eval()(tokens()).logits
        plain = load(small)(tokens()).logits
        merged = merge(model)
        torch.testing.assert_close(merged(tokens()).logits, adapted, rtol=0, atol=1e-5)
    assert not torch.allclose(plain, adapted, atol=1e-2)
    assert set(merged.state_dict()) == set(load(small).state_dict())


def losses(done):
    return [
        {k: v for k, v in entry.items() if k != "train_runtime"} for entry in done["log"] if "train_loss" not in entry
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "lora", "lora": {"dropout": 0.1}},
        {"train": "full", "loss": {"kind": "both", "hidden": 0.1}, "replace": {}, "micro_batch": 2},
    ],
    ids=["lora", "replacement"],
)
def test_a_killed_healing_goes_on_to_the_same_bits(small, tmp_path, monkeypatch, changes):
    (tmp_path / "test.txt").write_text("some words " * 100)
    changes = {**changes, "evaluation": {"text": str(tmp_path / "test.txt"), "blocks": 2}}
    whole = heal(small, tmp_path / "whole", **changes)
    step = HealTrainer.compute_loss

    def killed(self, *args, **options):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    monkeypatch.setattr(HealTrainer, "compute_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        heal(small, tmp_path / "killed", **changes)
    monkeypatch.undo()
    (training,) = (tmp_path / "killed" / ".run").glob("training-*")
    assert last_checkpoint(training) == training / "checkpoint-4"
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [".run"]
    (training / "checkpoint-6").mkdir()  # half of one, as a kill leaves it
    again = heal(small, tmp_path / "killed", **changes)
    assert losses(again) == losses(whole)
    assert changed(tmp_path / "whole", tmp_path / "killed") == set()
    assert "evaluate before" in whole["seconds"]
    assert "evaluate before" not in again["seconds"]
    assert again["evaluation"]["before"].keys() == whole["evaluation"]["before"].keys()
    assert again["evaluation"]["before"]["text"]["length"] == 128  # the model's context, though training took less
    with pytest.warns(UserWarning, match="holds this very healing"):
        heal(small, tmp_path / "killed", **changes)
    with pytest.raises(LayershareError, match="finished run of another recipe"):
        heal(small, tmp_path / "killed", **changes, seed=1)


def test_weights_are_in_files_of_the_size_that_was_asked_for(small, tmp_path):
    heal(small, tmp_path / "shards", train="norms", max_shard_size="20KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1


def test_micro_batches_and_checkpointing_change_nothing(small, tmp_path):
    options = {"train": "factors", "loss": {"kind": "both"}}
    heal(small, tmp_path / "whole", **options)
    heal(small, tmp_path / "parts", **options, micro_batch=1, gradient_checkpointing=True)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_results_tell_all_and_the_compression_s_stay(small, tmp_path):
    test = {"text": str(small.parent / "text.txt"), "blocks": 4, "length": 16}
    with pytest.warns(UserWarning, match="very text that it is trained on"):
        done = heal(
            small,
            tmp_path / "out",
            train="factors",
            loss={"kind": "distill"},
            optimizer={"lr": 1e-3},
            evaluation=test,
        )
    results = results_of(tmp_path / "out")
    compression = results_of(small)
    assert {key: value for key, value in results.items() if key != "healing"} == compression
    assert done == results["healing"]
    assert done["teacher"] == str(small.parent / "dense")
    assert done["needs"]["tokens"] == 8 * 4 * 16
    assert set(done["seconds"]) == {"evaluate before", "train", "write", "evaluate after"}
    before, after = (done["evaluation"][when] for when in ("before", "after"))
    assert after["kl"] < before["kl"]
    assert after["original_perplexity"] == before["original_perplexity"]
    assert [entry["step"] for entry in done["log"] if "loss" in entry] == [2, 4, 6, 8]
    held_out = [entry["held_out_loss"] for entry in done["log"] if "held_out_loss" in entry]
    assert len(held_out) == 9
    assert held_out[-1] < held_out[0]
    for name in ("plan.json", "recipe.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (small / name).read_bytes()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


def test_the_state_that_is_best_on_held_out_text_is_kept(small, tmp_path):
    # Far too large steps: first it becomes better, then worse.
    options = {"train": "factors", "optimizer": {"lr": 0.1, "schedule": "constant", "warmup": 0}}
    done = heal(small, tmp_path / "out", **options)
    held_out = [entry["held_out_loss"] for entry in done["log"] if "held_out_loss" in entry]
    assert min(held_out) < min(held_out[0], held_out[-1])
    tokens = job(small, **options).held_out
    assert held_out_loss(load(tmp_path / "out"), tokens, 4, torch.device("cpu")) == pytest.approx(min(held_out))


def test_a_training_that_never_helps_changes_nothing(small, tmp_path):
    one = asdict(settings(small).text) | {"tokens": 4 * 16}
    done = heal(small, tmp_path / "out", lora={"targets": "factors"}, text=one, optimizer={"lr": 3.0, "warmup": 0})
    held_out = [entry["held_out_loss"] for entry in done["log"] if "held_out_loss" in entry]
    assert held_out[0] == min(held_out)
    assert changed(small, tmp_path / "out") == set()


def test_relative_steps_are_a_part_of_each_tensor(small, tmp_path):
    one = asdict(settings(small).text) | {"tokens": 4 * 16}
    options = {"relative": True, "lr": 1e-3, "warmup": 0, "max_grad_norm": 1e30}
    heal(small, tmp_path / "out", train="factors", text=one, optimizer=options)
    before, after = weights(small), weights(tmp_path / "out")
    moved = changed(small, tmp_path / "out")
    assert moved
    for name in moved:  # Adam's first step is as long for every entry, but for those of tiny gradients
        step = (after[name] - before[name]).abs().max() / before[name].square().mean().sqrt()
        assert step.item() == pytest.approx(1e-3, rel=1e-2)
    with pytest.raises(LayershareError, match="as adapters are at first"):
        heal(small, tmp_path / "lora", train="lora", text=one, optimizer=options)


def test_stored_logits_of_the_teacher_do_for_the_teacher(small, tmp_path):
    live = heal(small, tmp_path / "live", train="full", loss={"kind": "distill"})
    stored = heal(small, tmp_path / "stored", train="full", loss={"kind": "distill", "store_teacher": 160})
    a, b = ([entry["loss"] for entry in done["log"] if "loss" in entry] for done in (live, stored))
    assert a == pytest.approx(b, rel=1e-3)
    assert not (tmp_path / "stored" / ".run").exists()


@pytest.mark.parametrize(("method", "keep"), [("shortgpt", 0.8), ("joint-drop", 0.7), ("slicegpt", 0.8)])
def test_other_compressions_heal_too(tmp_path, tokenizer, words, method, keep):
    folder = compress_tiny(tmp_path, tokenizer, words, method=method, keep=keep, of="all")
    done = heal(folder, tmp_path / "out", lora={"targets": "linears"}, loss={"kind": "both"})
    held_out = [entry["held_out_loss"] for entry in done["log"] if "held_out_loss" in entry]
    assert held_out[-1] < held_out[0]
    assert changed(folder, tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_other_weights_of_model_or_teacher_are_another_healing(suffix, small, tmp_path):
    shutil.copytree(small, tmp_path / "small")
    shutil.copyfile(small.parent / "text.txt", tmp_path / "text.txt")
    teacher = tmp_path / "teacher"

    def write(seed: int) -> None:
        model = tiny_model("llama", seed=seed)
        model.save_pretrained(teacher)
        if suffix == "bin":
            (teacher / "model.safetensors").unlink()
            torch.save(model.state_dict(), teacher / "pytorch_model.bin")
        AutoTokenizer.from_pretrained(small).save_pretrained(teacher)

    def prints() -> tuple[str, str]:
        taught = job(tmp_path / "small", teacher=str(teacher), loss={"kind": "distill"})
        return taught.fingerprint, job(teacher, text=text_for(small, 8)).fingerprint

    write(0)
    first = prints()
    assert prints() == first
    write(1)
    assert all(old != new for old, new in zip(first, prints(), strict=True))


def test_tensors_keep_their_own_types(small, tmp_path):
    shutil.copytree(small, tmp_path / "small")
    state = load_file(tmp_path / "small" / "model.safetensors")
    state = {name: each if "norm" in name else each.to(torch.bfloat16) for name, each in state.items() if len(each)}
    guard = {name: each for name, each in load_file(small / "model.safetensors").items() if not len(each)}
    save_file(state | guard, tmp_path / "small" / "model.safetensors", {"format": "pt"})
    (tmp_path / "small" / MANIFEST).unlink()
    heal(tmp_path / "small", tmp_path / "out", train="norms", text=text_for(small, 8))
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: each.dtype for name, each in new.items()} == {
        name: each.dtype for name, each in (state | guard).items()
    }


def test_an_ordinary_model_heals_without_results(small, tmp_path):
    dense = small.parent / "dense"
    heal(dense, tmp_path / "out", train="norms")
    assert changed(dense, tmp_path / "out") == {name for name in weights(dense) if name.endswith(NORMS)}
    assert set(results_of(tmp_path / "out")) == {"healing"}


def test_the_search_takes_the_best_and_goes_on_where_it_stopped(small, tmp_path, monkeypatch):
    options = {"train": "factors", "loss": {"kind": "both"}, "search": {"trials": 4, "budget": 0.5}}
    whole = heal(small, tmp_path / "whole", **options)
    trials = whole["search"]["trials"]
    assert trials[0]["settings"] == {"optimizer.lr": 1e-2, "loss.alpha": 0.5, "loss.temperature": 1.0}
    best = min(trials, key=lambda trial: trial["held_out_loss"])["settings"]
    chosen = whole["search"]["chosen"]
    assert (chosen["optimizer"]["lr"], chosen["loss"]["alpha"]) == (best["optimizer.lr"], best["loss.alpha"])
    assert whole["settings"]["optimizer"]["lr"] == 1e-2

    step, calls = HealTrainer.compute_loss, []

    def killed(self, *args, **more):
        calls.append(1)
        if len(calls) == 10:  # in the third trial of four steps each
            raise KeyboardInterrupt
        return step(self, *args, **more)

    monkeypatch.setattr(HealTrainer, "compute_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        heal(small, tmp_path / "killed", **options)
    calls.clear()
    calls += [1] * 100
    again = heal(small, tmp_path / "killed", **options)
    assert len(calls) == 100 + 2 * 4 + 8
    assert again["search"] == whole["search"]
    assert changed(tmp_path / "whole", tmp_path / "killed") == set()


def test_every_epoch_has_its_own_order_of_the_same_blocks():
    blocks = torch.arange(10)[:, None]
    order = Ordered(blocks, 25, seed=3)
    rows = [int(order[i]["input_ids"]) for i in range(25)]
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10))
    assert rows[:10] != rows[10:20]
    assert [int(Ordered(blocks, 25, seed=3)[i]["row"]) for i in range(25)] == rows
    assert sorted(int(Ordered(blocks, 4, seed=3)[i]["row"]) for i in range(4)) == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:The .grad attribute:UserWarning")
def test_bfloat16_compiled_is_near_float32(small, tmp_path):
    options = {"train": "factors", "loss": {"kind": "both"}, "replace": {"start": 0.5}, "optimizer": {"lr": 1e-3}}
    options |= {"gradient_checkpointing": True}
    plain = heal(small, tmp_path / "plain", **options)
    other = heal(small, tmp_path / "compiled", **options, precision="bfloat16", compile=True)
    for a, b in zip(losses(plain), losses(other), strict=True):
        for key in a.keys() & {"loss", "held_out_loss"}:
            assert b[key] == pytest.approx(a[key], rel=0.02)


class TestBadInput:
    def refuses(self, small, message, **changes):
        with pytest.raises(LayershareError, match=message):
            job(small, **changes).student()

    def test_settings(self, small):
        self.refuses(small, "Unknown LoRA target 'q_prj'. Did you mean 'q_proj'", lora={"targets": ["q_prj"]})
        self.refuses(small, "lora.targets is empty", lora={"targets": []})
        self.refuses(small, "has no deltas to train", train="deltas")
        self.refuses(small, "too few for 4 held out and a batch of 10000", batch_size=10000)
        self.refuses(small, "micro-batches of 3", micro_batch=3)
        self.refuses(small, "'dense' is not a model|There is no", model=str(small / "nothing"))

    def test_a_dense_model_has_no_coefficients(self, small):
        self.refuses(
            small.parent / "dense", "it has no coefficients; use lora.targets=linears", text=settings(small).text
        )

    def test_a_folder_that_is_no_model(self, tmp_path):
        with pytest.raises(LayershareError, match="not a model: it has no config"):
            prepare_healing(settings(tmp_path))

    def test_a_teacher_with_another_vocabulary(self, small, tmp_path):
        shutil.copytree(small.parent / "dense", tmp_path / "teacher")
        config = json.loads((tmp_path / "teacher" / "config.json").read_text())
        (tmp_path / "teacher" / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
        teacher = str(tmp_path / "teacher")
        self.refuses(small, "another vocabulary .200 tokens, this model 160", teacher=teacher, loss={"kind": "both"})

    def test_an_original_that_is_gone(self, small, tmp_path):
        shutil.copytree(small, tmp_path / "small", ignore=shutil.ignore_patterns(MANIFEST))
        for name in ("config.json", "results.json"):
            file = tmp_path / "small" / name
            file.write_text(file.read_text().replace(str(small.parent / "dense"), str(tmp_path / "gone")))
        options = {"loss": {"kind": "both"}, "text": {"text": str(small.parent / "text.txt"), "length": 16}}
        with pytest.raises(LayershareError, match="gone', which the model was made from, is not here; name"):
            prepare_healing(settings(tmp_path / "small", **options))

    def test_a_teacher_whose_tokens_have_other_numbers(self, small, tmp_path):
        shutil.copytree(small.parent / "dense", tmp_path / "teacher")
        file = tmp_path / "teacher" / "tokenizer.json"
        values = json.loads(file.read_text())
        numbers = values["model"]["vocab"]
        numbers["a"], numbers["b"] = numbers["b"], numbers["a"]
        file.write_text(json.dumps(values))
        problem = "another vocabulary .its token '[ab]' has another number"
        self.refuses(small, problem, teacher=str(tmp_path / "teacher"), loss={"kind": "both"})

    def test_a_tokenizer_that_does_not_fit_the_model(self, small, tmp_path):
        shutil.copytree(small, tmp_path / "model", ignore=shutil.ignore_patterns(MANIFEST))
        file = tmp_path / "model" / "tokenizer.json"
        values = json.loads(file.read_text())
        values["model"]["vocab"]["a"] = 500
        file.write_text(json.dumps(values))
        options = {"text": {"text": str(small.parent / "text.txt"), "length": 16}}
        with pytest.raises(LayershareError, match="makes tokens up to number 500, the model knows 160"):
            prepare_healing(settings(tmp_path / "model", **options))

    def test_a_model_that_does_not_say_what_it_was(self, small):
        dense = small.parent / "dense"
        with pytest.raises(LayershareError, match="name the original with --teacher"):
            prepare_healing(settings(dense, loss={"kind": "distill"}, text=settings(small).text))

    def test_a_loss_that_is_no_number(self, small, tmp_path):
        wild = {"lr": 1e30, "warmup": 1.0, "max_grad_norm": 1e30}  # from the second step on
        with pytest.raises(LayershareError, match=r"after step 2; the last good checkpoint is .*checkpoint-1'"):
            heal(small, tmp_path / "out", train="full", optimizer=wild, save_every=1, log_every=1)
        assert list((tmp_path / "out" / ".run").glob("training-*/checkpoint-*/trained.safetensors"))

    def test_nothing_is_left_of_a_loss_that_is_no_number_at_once(self, small, tmp_path):
        wild = {"train": "full", "optimizer": {"lr": 1e30, "warmup": 0}, "save_every": 8, "log_every": 8}
        with pytest.raises(LayershareError, match="not a number in step 2"):
            heal(small, tmp_path / "out", **wild, evaluate_every=8)
        assert not (tmp_path / "out").exists()
        text = asdict(settings(small).text) | {"tokens": 4 * 16}
        with pytest.raises(LayershareError, match="not a number after step 1"):  # the last one
            heal(small, tmp_path / "out", **wild, text=text)
        assert not (tmp_path / "out").exists()

    def test_a_model_whose_loss_is_no_number(self, small, tmp_path):
        shutil.copytree(small, tmp_path / "broken", ignore=shutil.ignore_patterns(MANIFEST))
        tensors = {name: tensor * float("nan") for name, tensor in weights(small).items()}
        save_file(tensors, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
        with pytest.raises(LayershareError, match="contain NaN or infinity"):
            heal(tmp_path / "broken", tmp_path / "out", text=settings(small).text)
        assert not (tmp_path / "out").exists()

    def test_optuna_is_missing(self, small, monkeypatch):
        monkeypatch.setattr("layershare.healing.job.find_spec", lambda name: None)
        self.refuses(small, r"pip install '\.\[search\]'", search={})

    def test_peft_is_missing(self, small, monkeypatch):
        monkeypatch.setattr("layershare.healing.parameters.find_spec", lambda name: None)
        self.refuses(small, r"pip install '\.\[heal\]'")
