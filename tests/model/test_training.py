import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from layershare.errors import LayershareError
from layershare.model.hub import load
from layershare.model.layers import ComposedLinear
from tests.families import tokens
from tests.model.small import compressed, logits

# transformers renames these methods; its oldest supported version, and PEFT, know the old names only.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")


@pytest.fixture
def folder(tmp_path):
    compressed("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def step_losses(model, steps: int = 4) -> list[float]:
    ids = tokens()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_full_fine_tuning(folder, tmp_path):
    model = load(folder)
    before = copy.deepcopy(model)
    losses = step_losses(model.train())
    assert losses == sorted(losses, reverse=True)
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(new, old), name
    model.eval().save_pretrained(tmp_path / "tuned")
    assert torch.equal(logits(load(tmp_path / "tuned")), logits(model))


def test_hf_trainer_trains_saves_and_resumes(folder, tmp_path):
    data = [{"input_ids": row, "labels": row} for row in tokens(batch=8)]

    def trainer(steps: int) -> Trainer:
        options = TrainingArguments(
            tmp_path / "out", max_steps=steps, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, seed=0
        )
        return Trainer(load(folder), options, train_dataset=data)  # pyright: ignore[reportArgumentType]

    first = trainer(2)
    first.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert first.model is not None
    assert torch.equal(logits(load(checkpoint)), logits(first.model.eval()))
    second = trainer(3)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.state.global_step == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(folder, reentrant):
    plain, checkpointed = load(folder).train(), load(folder).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize("target", ["coef", "basis", "base", "down", "up"])
def test_lora_on_factors_and_deltas(folder, tmp_path, target):
    peft = get_peft_model(load(folder), LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    losses = step_losses(peft)
    assert losses[-1] < losses[0]
    expected = logits(peft.eval())
    assert not torch.allclose(expected, logits(load(folder)))
    peft.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    with pytest.raises(LayershareError, match="merge or unload"):
        again.get_base_model().dequantize()  # pyright: ignore[reportCallIssue]
    merged = again.merge_and_unload()  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = load(tmp_path / "merged")
    composed = [module for module in reloaded.modules() if isinstance(module, ComposedLinear)]
    assert {module.composition.whole for module in composed} == {True, False}
    assert torch.equal(logits(reloaded), logits(merged))


def test_adapters_through_transformers(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.add_adapter(LoraConfig(r=2, target_modules=["coef"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    again = load(folder)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model.eval()))


def test_compiles_without_a_break(folder):
    model = load(folder)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(tokens()).logits, logits(model))
