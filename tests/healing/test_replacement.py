import copy
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState, TrainingArguments

import layershare
from layershare.errors import LayershareError
from layershare.healing.replacement import LOGGED, ReplacementCallback, gates
from layershare.healing.settings import Replacement
from layershare.model.arch import find_blocks
from layershare.model.hub import load
from layershare.model.layers import SharedLinear
from layershare.recipe import make_as
from tests.families import CONFIGS, tiny_model, tokens
from tests.model.small import compressed, logits

# transformers renames these methods; its oldest supported version, and PEFT, know the old names only.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

SCHEDULE = Replacement()


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    return find_blocks(model)[1]


def test_schedule():
    some = Replacement(start=0.2, ramp=0.5, spread=0.4)
    for depth in (0.0, 0.3, 1.0):
        assert some.probability(0, depth) == pytest.approx(0.2)
        values = [some.probability(step / 100, depth) for step in range(101)]
        assert values == sorted(values)
        assert set(values[50:]) == {1.0}  # the phase without gates
    assert some.probability(0.25, 0) == pytest.approx(0.6)  # halfway up
    assert some.probability(0.15, 1) == pytest.approx(0.6)
    assert some.probability(0.299, 1) < 1 == some.probability(0.3001, 1)
    assert some.probability(0.25, 0) < some.probability(0.25, 0.5) < some.probability(0.25, 1)
    assert Replacement(spread=0).probability(0.3, 1) == Replacement(spread=0).probability(0.3, 0)


@pytest.mark.parametrize("wrong", [{"start": 1.1}, {"ramp": 0}, {"ramp": 1.5}, {"spread": 1}, {"spread": -0.1}])
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(LayershareError, match="in the recipe: Input should be"):
        make_as(Replacement, wrong)


@pytest.mark.parametrize("family", CONFIGS)
def test_each_gate_calls_one_of_two_blocks(family):
    """On every family, against a model that is put together by hand."""
    student, original = compressed(family), tiny_model(family)
    names = list(student.state_dict()), [name for name, _ in student.named_parameters()]
    expected, mixed = logits(student), copy.deepcopy(student)
    for layer in (1, 2):
        blocks_of(mixed)[layer] = blocks_of(original)[layer]
    with gates(student, original, SCHEDULE) as found:
        assert [gate.number for gate in found] == [0, 1, 2, 3]
        assert (list(student.state_dict()), [name for name, _ in student.named_parameters()]) == names
        for gate in found:
            gate.open = False
        assert torch.equal(logits(student), expected)  # eval mode measures the student
        for block in blocks_of(student):  # without its parts, and with OPT's own dropout off: nothing is drawn
            block.training = True
            vars(block).update(dropout=0.0) if family == "opt" else None
        assert torch.equal(logits(student), logits(original))
        found[0].open = found[3].open = True
        assert torch.equal(logits(student), logits(mixed))
    student.eval()
    assert all("forward" not in vars(block) for block in blocks_of(student))
    assert torch.equal(logits(student), expected)


def test_gradients_reach_only_the_students_open_blocks():
    student, original = compressed("llama").train(), tiny_model("llama")
    with gates(student, original, SCHEDULE) as found:
        found[1].open = False
        student(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is None for parameter in blocks_of(original).parameters())
    for number, block in enumerate(blocks_of(student)):
        shared = {p for m in block.modules() if isinstance(m, SharedLinear) for p in m.parameters()}
        own = [p for p in block.parameters() if p not in shared]  # what is shared serves other blocks, too
        assert all((p.grad is None) == (number == 1) for p in own)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    original, gradients = tiny_model(family), []
    for checkpointing in (False, True):
        student = compressed(family).train()
        for module in student.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        student.config.attention_dropout = 0.0
        with gates(student, original, SCHEDULE) as found:
            found[0].open = found[2].open = False
            if checkpointing:
                student.gradient_checkpointing_enable({"use_reentrant": reentrant})
                student.enable_input_require_grads()
            student(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_the_originals_blocks_are_checkpointed_too():
    student, original = compressed("llama").train(), tiny_model("llama")
    calls = []
    handle = blocks_of(original)[1].register_forward_pre_hook(lambda *_: calls.append(1))
    student.gradient_checkpointing_enable({"use_reentrant": False})
    with gates(student, original, SCHEDULE) as found:
        found[1].open = False
        student(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    handle.remove()
    assert len(calls) == 2


@pytest.mark.parametrize("first", ["compile", "gate"])
def test_compiled_blocks(first):
    student, original = compressed("llama").train(), tiny_model("llama")
    plain = compressed("llama").train()

    def compile_blocks():
        for block in blocks_of(student):
            block.compile(backend="eager", fullgraph=True)

    if first == "compile":
        compile_blocks()
    with gates(student, original, SCHEDULE) as found, gates(plain, original, SCHEDULE) as others:
        if first == "gate":
            compile_blocks()
        for pattern in ((True, True, True, True), (False, True, False, True), (True, False, False, True)):
            for gate, other, is_open in zip(found, others, pattern, strict=True):
                gate.open = other.open = is_open
            torch.testing.assert_close(logits(student), logits(plain))


def test_only_blocks_that_differ_are_gated(tokenizer, words):
    original = tiny_model("llama")
    small = layershare.compress(original, tokenizer, method="mlp-drop", keep=0.9, text=words, blocks=8, length=32)
    dropped = [i for i, block in enumerate(blocks_of(small)) if "Dropped" in repr(block)]
    assert 0 < len(dropped) < 4
    with gates(small, original, SCHEDULE) as found:
        assert [gate.number for gate in found] == dropped
    with torch.no_grad():
        blocks_of(small)[0].input_layernorm.weight.add_(1)  # pyright: ignore
    with gates(small, original, SCHEDULE) as found:
        assert [gate.number for gate in found] == sorted({0, *dropped})


def test_depth_counts_the_gated_blocks():
    with gates(compressed("llama"), tiny_model("llama"), SCHEDULE) as found:
        assert [gate.depth for gate in found] == pytest.approx([0, 1 / 3, 2 / 3, 1])
        assert found[3].probability(0.2) > found[0].probability(0.2)


def test_models_whose_blocks_cannot_be_exchanged_are_refused(tokenizer, words):
    original = tiny_model("llama")
    options: dict[str, Any] = {"text": words, "blocks": 8, "length": 32, "keep": 0.7}
    short = layershare.compress(original, tokenizer, method="shortgpt", **options)
    sliced = layershare.compress(original, tokenizer, method="slicegpt", **options)
    for student, message in (
        (short, r"has 2 'llama' blocks and its original 4"),
        (compressed("qwen2"), "'qwen2' blocks"),
        (sliced, "other hidden states"),
        (copy.deepcopy(original), "nothing to replace"),
    ):
        with pytest.raises(LayershareError, match=message), gates(student, original, SCHEDULE):
            pass
        assert all("forward" not in vars(block) for block in blocks_of(student))


def begin(callback: ReplacementCallback, step: int, steps: int = 100) -> list[bool]:
    state = TrainerState(global_step=step, max_steps=steps)
    callback.on_step_begin(TrainingArguments(report_to=[], use_cpu=True), state, TrainerControl())
    return [gate.open for gate in callback.gates]


def test_draws_depend_on_seed_step_and_block_alone():
    student, original = compressed("llama"), tiny_model("llama")
    with gates(student, original, SCHEDULE) as found:
        callback = ReplacementCallback(found, seed=3)
        draws = [begin(callback, step) for step in range(100)]
        torch.manual_seed(99)  # what a process has drawn otherwise does not matter
        again = ReplacementCallback(found, seed=3)
        assert [begin(again, step) for step in reversed(range(100))] == draws[::-1]
        assert [begin(ReplacementCallback(found, seed=4), step) for step in range(100)] != draws
        assert len({tuple(draw) for draw in draws}) > 5
        assert all(all(draw) for draw in draws[60:])  # the phase without gates
        assert all(any(draw) for draw in draws)


def test_draws_are_as_frequent_as_the_schedule_says():
    schedule = Replacement(start=0.5, ramp=1.0, spread=0.5)
    with gates(compressed("llama"), tiny_model("llama"), schedule) as found:
        callback = ReplacementCallback(found, seed=0)
        draws = torch.tensor([begin(callback, 0, 10) for callback.seed in range(400)], dtype=torch.float64)
        torch.testing.assert_close(
            draws.mean(0), torch.full((4,), 0.5 + 0.5**4 / 4, dtype=torch.float64), atol=0.08, rtol=0
        )
        assert callback.mean == 0.5


def test_a_step_with_nothing_to_train_does_not_occur():
    with gates(compressed("llama"), tiny_model("llama"), Replacement(start=0.0)) as found:
        callback = ReplacementCallback(found, seed=0)
        draws = [begin(callback, 0) for callback.seed in range(40)]
    assert all(sum(draw) == 1 for draw in draws)
    assert all(any(draw[i] for draw in draws) for i in range(4))


def test_the_trainer_trains_saves_and_resumes_a_gated_model(tmp_path):
    compressed("llama").save_pretrained(tmp_path / "small")
    original = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    data = [{"input_ids": row, "labels": row} for row in tokens(batch=24)]

    def train(name: str, resume: bool = False) -> tuple[PreTrainedModel, Trainer]:
        student = load(tmp_path / "small")
        with gates(student, original, Replacement(ramp=0.9)) as found:
            options = TrainingArguments(
                tmp_path / name, max_steps=6, save_steps=3, logging_steps=1, per_device_train_batch_size=2,
                gradient_accumulation_steps=2, gradient_checkpointing=True, report_to=[], use_cpu=True,
                disable_tqdm=True, seed=0, learning_rate=1e-2,
            )  # fmt: skip
            callback = ReplacementCallback(found, seed=0)
            trainer = Trainer(student, options, train_dataset=data, callbacks=[callback])  # pyright: ignore
            trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3") if resume else None)
        return student, trainer

    student, trainer = train("whole")
    history = [entry[LOGGED] for entry in trainer.state.log_history if "loss" in entry]
    assert history == sorted(history)
    assert history[-1] < 1 < history[-1] + 0.3
    assert isinstance(trainer.optimizer, AcceleratedOptimizer)
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in student.parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())
    assert torch.equal(logits(load(tmp_path / "whole" / "checkpoint-6")), logits(student.eval()))
    resumed, _ = train("resumed", resume=True)
    assert torch.equal(logits(resumed.eval()), logits(student))
