"""Layers whose factors are stored as small integers: sizes, loading, saving, what is refused."""

import subprocess
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import layershare
from layershare.errors import LayershareError
from layershare.model.checkpoint import file_bytes
from layershare.model.composition import Composition, Factor, Member, Storage, deltas, shared
from layershare.model.describe import describe
from layershare.model.hub import LayershareConfig, adopt, save
from layershare.model.layers import ComposedLinear, QuantizedLinear, SharedLinear
from layershare.plan.layout import composed_tensors
from layershare.progress import no_progress
from layershare.solve.quantize import quantize_factors
from tests.families import tiny_model, tokens
from tests.model.small import adopt as adopted
from tests.model.small import compressed, filled, logits

FAMILIES = ["llama", "qwen2", "gemma2", "gpt2", "falcon", "phi"]
INT4, INT8 = Storage(4, 8), Storage(8, 8)
NV, MX = Storage(4, 16, "nvfp4"), Storage(4, 32, "mxfp4")


def quantized(
    model: Any, storage: Storage = INT4, basis: Storage = INT8, text: torch.Tensor | None = None, **options: Any
) -> Any:
    """The model, quantized in place, as a loaded one."""
    before = getattr(model, "hf_quantizer", None)
    edits = before.edits if before else LayershareConfig()
    dtype = model.dtype
    options = {"tokens": text, "batch_size": 2, "progress": no_progress, **options}
    compositions, errors = quantize_factors(
        model, edits.compositions, lambda each: each.stored_as(storage, basis), dtype, **options
    )
    assert all(0 < error < 0.5 for error in errors.values()), errors
    adopt(model, LayershareConfig(compositions, dropped=edits.dropped))
    return model


@pytest.mark.parametrize("text", [None, tokens(4, 16)], ids=["rounded", "gptq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_model_loads_as_it_was_saved(tmp_path, family, text):
    model = quantized(compressed(family), text=text)
    save(model, tmp_path / "small")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.compositions == model.config.quantization_config.compositions
    layershare.verify(tmp_path / "small")
    save(again, tmp_path / "again")
    one, two = (tmp_path / name / "model.safetensors" for name in ("small", "again"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_is_quantized_as_well(tmp_path, family):
    model = quantized(tiny_model(family), INT8, text=tokens(4, 16))
    inside = [module for module in model.modules() if isinstance(module, ComposedLinear)]
    assert len(inside) == len(describe(tiny_model(family).config).linears)
    assert all(isinstance(part, QuantizedLinear) for layer in inside for part in layer.parts())
    expected = logits(tiny_model(family))
    assert 0 < (logits(model) - expected).abs().max() < 0.1 * expected.abs().max()
    save(model, tmp_path / "small")
    assert torch.equal(logits(layershare.load(tmp_path / "small")), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_its_dense_weights_do(tmp_path, family):
    model = quantized(compressed(family))
    expected = logits(model)
    save(model, tmp_path / "small")
    dense = layershare.load(tmp_path / "small", dense=True)
    assert not any(isinstance(module, ComposedLinear | QuantizedLinear) for module in dense.modules())
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path / "dense")
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(plain), logits(dense))


def members(model: Any, role: str = "mlp.up_proj") -> tuple[Member, ...]:
    linears = dict(model.base_model.named_modules())
    return tuple(
        Member(
            f"layers.{i}.{role}", linears[f"layers.{i}.{role}"].in_features, linears[f"layers.{i}.{role}"].out_features
        )
        for i in range(4)
    )


KINDS: dict[str, Any] = {
    "shared on the input side": lambda m: [shared(members(m)[:2], 6, "input")],
    "shared on the output side": lambda m: [shared(members(m, "mlp.down_proj")[:2], 6, "output")],
    "joint": lambda m: [shared([members(m, "mlp.gate_proj")[0], members(m)[0]], 6, "input")],
    "hybrid": lambda m: [shared(members(m)[:2], 6, "input", private_rank=3)],
    "pivoted": lambda m: [shared(members(m)[:2], 6, "input", pivot=True)],
    "pivoted on the output side": lambda m: [shared(members(m, "mlp.down_proj")[:2], 6, "output", pivot=True)],
    "deltas": lambda m: [deltas(members(m)[:2], 6, [members(m)[1].name])],
    "low rank": lambda m: [shared(members(m)[:1], 7, "input")],
    "dense": lambda m: [],
}


def built(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny llama with one composition of a kind, its factors random."""
    model = tiny_model("llama", dtype=dtype)
    return filled(adopted(model, LayershareConfig(KINDS[kind](model))))


@pytest.mark.parametrize("storage", [(Storage(4, 24), Storage(8, 5)), (NV, MX)], ids=["integers", "floats"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_predicted_to_the_byte(tmp_path, kind, dtype, storage):
    model = quantized(built(kind, dtype), *storage)
    save(model, tmp_path / "small")
    spec = describe(tiny_model("llama", dtype=dtype))
    compositions: tuple[Composition, ...] = model.config.quantization_config.compositions
    gone = {f"model.{name}.weight" for each in compositions for name in each.names}
    predicted = {name: tensor for name, tensor in spec.tensors.items() if name not in gone}
    for each in compositions:
        predicted |= composed_tensors(spec, each)
    predicted[f"model.{model.hf_quantizer.edits.guard}"] = ((0,), torch.uint8)
    path = tmp_path / "small" / "model.safetensors"
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.offset_keys()}
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()} == predicted
    assert file_bytes({name: predicted[name] for name in found}) == path.stat().st_size
    assert torch.equal(logits(layershare.load(tmp_path / "small")), logits(model))


def test_storage_stands_in_the_config_and_changes_no_count():
    model = tiny_model("llama")
    (composition,) = KINDS["hybrid"](model)
    stored = composition.stored_as(INT4, INT8)
    assert {factor.name: factor.storage for factor in stored.factors} == {
        "basis": INT8,
        "coef": INT4,
        "own": INT4,
        "private": INT4,
    }
    assert Composition.from_json(stored.to_json()) == stored
    assert stored.to_json()["terms"][0]["factors"][0]["storage"] == {"bits": 8, "group": 8}
    assert "storage" not in composition.to_json()["terms"][0]["factors"][0]
    assert (stored.parameters, stored.multiplications) == (composition.parameters, composition.multiplications)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ((7,), "Unknown number of bits '7'"),
        ((4, 0), "A group of 0"),
        ((4, 16, "fp4"), "Unknown scheme 'fp4'. Did you mean 'nvfp4'?"),
        ((8, 16, "nvfp4"), "nvfp4 has 4 bits in groups of 16: leave bits and groups out"),
        ((4, 64, "mxfp4"), "mxfp4 has 4 bits in groups of 32"),
    ],
)
def test_what_cannot_be_stored_is_refused(values, sentence):
    with pytest.raises(LayershareError, match=sentence):
        Storage(*values)


def test_what_is_shared_stays_of_the_class_that_wrap_policies_name():
    model = quantized(built("shared on the input side"))
    basis = model.model.layers[0].mlp.up_proj.basis
    assert isinstance(basis, SharedLinear)
    assert isinstance(basis, QuantizedLinear)
    assert "4 bits" in repr(model)
    assert model.model.layers[1].mlp.up_proj.part(Factor("basis", outward=6, home="layers.0.mlp.up_proj")) is basis


@pytest.mark.parametrize("storage", [INT4, NV, MX], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_runs_in_another_dtype_and_saves_the_same(tmp_path, dtype, storage):
    model = quantized(built("hybrid", dtype), storage, storage)
    save(model, tmp_path / "small")
    wide = layershare.load(tmp_path / "small", dtype=torch.float32)
    place = "model.layers.0.mlp.up_proj.coef"
    narrow, part = (each.get_submodule(place).weight for each in (model, wide))
    assert (narrow.dtype, part.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(narrow.float(), part, rtol=torch.finfo(dtype).eps, atol=0)
    save(wide.to(dtype), tmp_path / "again")  # pyright: ignore[reportArgumentType]
    one, two = (tmp_path / name / "model.safetensors" for name in ("small", "again"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("storage", [NV, MX], ids=str)
def test_scales_in_bytes_that_are_no_numbers_are_refused(tmp_path, storage):
    model = quantized(built("hybrid"), storage, storage)
    part = model.model.layers[0].mlp.up_proj.coef
    part.scales[0, 0] = {"nvfp4": 127, "mxfp4": 255}[storage.scheme]  # NaN, and what is above every float32
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(LayershareError, match=r"up_proj\.coef\.scales"):
        layershare.load(tmp_path / "small")


def test_gptq_hears_the_inputs_that_quantized_blocks_produce(monkeypatch):
    """The Gram of each factor is that of what it is given by the model up to there as it is in the end."""
    seen: dict[int, torch.Tensor] = {}
    from layershare.solve import quantize

    def remember(weight, gram, scales, numbers):
        seen[weight.data_ptr()] = gram
        return compensated(weight, gram, scales, numbers)

    compensated = quantize.compensated
    monkeypatch.setattr(quantize, "compensated", remember)
    model, text = built("hybrid"), tokens(4, 16)
    addresses = {name: p.data_ptr() for name, p in model.named_parameters() if "up_proj" in name or "q_proj" in name}
    quantized(model, text=text)
    inputs: dict[str, torch.Tensor] = {}
    hooks = {
        "model.layers.1.mlp.up_proj.private",
        "model.layers.1.mlp.up_proj.coef",
        "model.layers.3.self_attn.q_proj.base",
    }
    for name in hooks:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.__setitem__(name, args[0].flatten(0, 1))
        )
    model(text)
    for name in hooks:
        key = f"{name}.weight" if "up_proj" in name else "model.layers.3.self_attn.q_proj.weight"
        torch.testing.assert_close(seen[addresses[key]], inputs[name].T @ inputs[name], rtol=1e-3, atol=1e-3)


LORA = """
import sys, torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
expected = torch.load(sys.argv[2])
ids = expected["ids"]
assert torch.equal(model(ids).logits, expected["logits"])
adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"]))
optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
for _ in range(2):
    adapted(ids, labels=ids).loss.backward()
    optimizer.step()
trained = adapted(ids).logits
assert not torch.equal(trained, expected["logits"])
adapted.save_pretrained(sys.argv[1] + "/adapter")
try:
    adapted.merge_and_unload()
except Exception as error:
    assert "cannot be merged into quantized weights" in str(error), error
else:
    raise AssertionError("merged")
from peft import PeftModel
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[1] + "/adapter")
assert torch.equal(again.eval()(ids).logits, trained)
try:
    other = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    get_peft_model(AutoModelForCausalLM.from_pretrained(sys.argv[1]), other)
except Exception as error:
    assert "adapters of LoRA alone" in str(error), error
else:
    raise AssertionError("IA3")
"""


def test_a_fresh_process_loads_it_and_trains_adapters_beside_it(tmp_path, commands):
    model = quantized(built("hybrid"))
    save(model, tmp_path / "small")
    torch.save({"ids": tokens(), "logits": model(tokens()).logits.detach()}, tmp_path / "expected.pt")
    command = [commands / "python", "-c", LORA, str(tmp_path / "small"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
