import copy

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from layershare.errors import LayershareError
from layershare.model.hub import LayershareConfig, load
from layershare.model.layers import DeltaLinear, FactorLinear
from layershare.model.swap import Dropped
from tests.families import tiny_model, tokens
from tests.model.small import adopt, compressed, logits

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
    assert {FactorLinear, DeltaLinear} <= {type(module) for module in reloaded.modules()}
    assert torch.equal(logits(reloaded), logits(merged))


def test_adapters_through_transformers(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    again = load(folder)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model.eval()))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", LoraConfig(init_lora_weights=False)),  # PEFT's own targets for the family
        ("llama", LoraConfig(init_lora_weights=False, target_modules=r".*layers\.[01].*_proj", use_dora=True)),
        ("llama", LoraConfig(init_lora_weights=False, target_modules="all-linear", use_rslora=True)),
        ("llama", IA3Config(init_ia3_weights=False)),
        ("llama", LoHaConfig(init_weights=False, target_modules=["v_proj", "up_proj"])),
        ("gpt2", LoraConfig(init_lora_weights=False, target_modules=["c_attn", "c_proj"])),
        ("phi3", LoraConfig(init_lora_weights=False, target_modules=["qkv_proj", "gate_up_proj"])),
    ],
)
def test_adapters_on_layers_by_their_usual_names(tmp_path, family, config):
    compressed(family).save_pretrained(tmp_path / "model")
    dense = logits(load(tmp_path / "model"))
    peft = get_peft_model(load(tmp_path / "model"), copy.deepcopy(config))
    losses = step_losses(peft)
    assert losses[-1] < losses[0]
    expected = logits(peft.eval())
    assert not torch.allclose(expected, dense)
    with peft.disable_adapter():  # pyright: ignore[reportCallIssue]
        assert torch.equal(logits(peft), dense)
    peft.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tmp_path / "model"), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    merged = again.merge_and_unload()  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))


def adapted(model, config, name: str = "default") -> dict[str, int]:
    """The modules that got an adapter, with its rank."""
    peft = get_peft_model(model, config, name)
    return {key: module.r[name] for key, module in peft.get_base_model().named_modules() if hasattr(module, "lora_A")}


def test_the_own_part_of_a_layer_takes_its_adapter_and_rank(folder):
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 1], rank_pattern={"v_proj": 3}
    )
    assert adapted(load(folder), config) == {
        "model.layers.0.self_attn.q_proj.coef": 2,
        "model.layers.1.self_attn.q_proj.coef": 2,
        "model.layers.0.self_attn.v_proj.base": 3,
        "model.layers.1.self_attn.v_proj.up": 3,
    }


def test_a_second_adapter_by_the_usual_names(folder):
    peft = get_peft_model(load(folder), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    first = logits(peft.eval())
    peft.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    assert torch.equal(logits(peft), first)
    peft.set_adapter("second")
    assert not torch.allclose(logits(peft), first)


def test_dropped_layers_take_no_adapter():
    mlp = ("gate_proj", "up_proj", "down_proj")
    dropped = Dropped("mlp", tuple(f"layers.1.mlp.{name}" for name in mlp))

    def model():
        return adopt(tiny_model("llama"), LayershareConfig(dropped=[dropped]))

    names = adapted(model(), LoraConfig(target_modules=["q_proj", *mlp]))
    assert len(names) == 4 + 3 * 3
    with pytest.raises(LayershareError, match="were dropped"):
        adapted(model(), LoraConfig(target_modules=["up_proj"], layers_to_transform=[1]))


def test_an_adapter_of_the_original_is_refused(folder, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    get_peft_model(dense, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    for trainable in (False, True):
        with pytest.raises(LayershareError, match="trained on another model"):
            PeftModel.from_pretrained(load(folder), tmp_path / "adapter", is_trainable=trainable)


def test_copies_that_would_not_share_are_refused(folder):
    for name in ("v_proj", "mlp"):
        with pytest.raises(LayershareError, match="no longer shares"):
            get_peft_model(load(folder), LoraConfig(target_modules=["q_proj"], modules_to_save=[name]))
    get_peft_model(load(folder), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))


def test_compiles_without_a_break(folder):
    model = load(folder)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(tokens()).logits, logits(model))
