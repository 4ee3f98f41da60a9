"""Folders of ours, served by vLLM as they are."""
# pyright: reportMissingImports=false

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import layershare
from layershare.errors import LayershareError
from layershare.model.composition import Composition, Factor, Member, Term, deltas, shared
from layershare.model.hub import LayershareConfig, load, save
from layershare.model.swap import Dropped, member_of
from layershare.plan.edits import Drop
from tests.families import tiny_model
from tests.model.small import adopt, compressed, filled
from tests.model.test_dropped import carried_out
from tests.model.test_quantized import INT4, INT8, MX, NV, quantized
from tests.serve.engine import config_of, expected, register_here, require_same, said, served, serving

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: `make test-vllm`")

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite"),
    *("opt", "stablelm", "cohere", "glm4"),
)
FAMILIES_BY_TRANSFORMERS = ("olmo2", "starcoder2", "phi", "gpt_neox", "smollm3")
"""Those of which vLLM runs transformers' code."""


def of_all_kinds(**changes: Any) -> Any:
    """A Llama with every kind of composition, in fused layers that mix them with dense members, and dropped parts."""
    model = tiny_model("llama", config=config_of("llama", **changes))
    linears = {n: m for n, m in model.base_model.named_modules() if isinstance(m, nn.Linear)}

    def members(*names: str) -> list[Member]:
        return [member_of(name, linears[name]) for name in map(full, names)]

    def full(name: str) -> str:
        layer, last = name.split(".")
        return f"layers.{layer}.{'self_attn' if last in 'qkvo' else 'mlp'}.{last}_proj"

    chain = (
        Factor("basis", outward=7, home=full("0.down"), form="pivoted"),
        Factor("middle", inward=7, outward=5),
        Factor("coef", inward=5),
    )
    compositions = [
        shared(members("0.q", "0.k", "0.v", "1.q", "1.k"), 9, "input", private_rank=3, pivot=True),  # 1.v is dense
        shared(members("2.q", "2.o"), 5, "input"),  # of which tensor parallelism splits one by rows, one by columns
        shared(members("2.v"), 6, "output", pivot=True),  # 2.k is dense
        deltas(members("0.o", "1.o"), 6, [full("1.o")]),
        shared(members("0.gate", "0.up"), 11, "input"),
        shared(members("1.gate", "3.gate"), 8, "input", private_rank=2),  # 3.up is dense
        shared(members("1.up"), 4, "output"),
        shared(members("1.down", "3.down"), 12, "output", private_rank=5),
        Composition(tuple(members("0.down")), (Term(chain),)),
    ]
    dropped = [
        Dropped("mlp", tuple(full(f"2.{each}") for each in ("gate", "up", "down"))),
        Dropped("attention", tuple(full(f"3.{each}") for each in "qkvo")),
    ]
    return filled(adopt(model, LayershareConfig(compositions, dropped=dropped)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_says_what_it_says_in_transformers(family, tmp_path):
    save(compressed(family, config=config_of(family)), tmp_path / "small")
    with served(tmp_path / "small"):
        pass


def test_every_kind_is_served_and_held_once(tmp_path):
    model = of_all_kinds()
    save(model, tmp_path / "small")
    with served(tmp_path / "small") as llm:
        vllm_config = llm.llm_engine.vllm_config
        parts = vllm_config.quant_config.store.parts
        # q, k and v of layer 0 read with the shared, pivoted basis and three private ones, which are one matrix.
        assert sum(len(keys) == 3 for keys in parts) == 2
        joins = [f"{key.home}.{key.name}" for keys in parts for key in keys]
        assert len(joins) == len(set(joins))
        attentions = vllm_config.compilation_config.static_forward_context
        rooms = {name: each.kv_cache.numel() for name, each in attentions.items()}
        assert [room > 0 for room in rooms.values()] == [True, True, True, False]


def test_it_is_compiled_as_other_models_are(tmp_path):
    save(of_all_kinds(), tmp_path / "small")
    with served(tmp_path / "small", enforce_eager=False):
        pass


def test_a_model_of_fewer_layers_needs_nothing_of_ours(tmp_path):
    model = tiny_model("llama", config=config_of("llama"))
    carried_out(model, [Drop("block", (1, 2))], tmp_path / "run")
    assert "quantization_config" not in json.loads((tmp_path / "run" / "small" / "config.json").read_text())
    with served(tmp_path / "run" / "small"):
        pass


@pytest.mark.parametrize("storage", [(INT4, INT8), (NV, MX)], ids=["integers", "floats"])
def test_quantized_factors_are_served(storage, tmp_path):
    save(quantized(of_all_kinds(), *storage), tmp_path / "small")
    with served(tmp_path / "small"):
        pass


@pytest.mark.parametrize("kind", ["llama", "quantized", "phi3"])
def test_two_processes_share_a_model(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    few = {"num_key_value_heads": 1}  # on both
    model = compressed(kind, config=config_of(kind, **few)) if kind == "phi3" else of_all_kinds()
    save(quantized(model) if kind == "quantized" else model, tmp_path / "small")
    with served(tmp_path / "small", tensor_parallel_size=2):
        pass


def test_stages_of_a_pipeline_each_hold_what_they_share(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    save(quantized(of_all_kinds()), tmp_path / "small")
    compiled = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}  # else stages fail on CPUs
    with served(tmp_path / "small", pipeline_parallel_size=2, **compiled):
        pass


@pytest.fixture
def small(tmp_path) -> Path:
    """A folder with quantized factors, and dense layers among them."""
    save(quantized(compressed("llama", config=config_of("llama"))), tmp_path / "small")
    return tmp_path / "small"


def with_adapter(model: Any, folder: Path) -> Any:
    """The model with a random adapter on all layers, which is saved."""
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(str(folder))
    return adapted


def test_an_adapter_of_lora_is_added_to_what_is_compressed(small, tmp_path):
    from vllm.lora.request import LoRARequest

    dense: Any = with_adapter(load(small, dense=True), tmp_path / "adapter")
    dense.merge_and_unload().save_pretrained(tmp_path / "merged")
    theirs = expected(tmp_path / "merged")
    assert theirs.tokens != expected(small).tokens
    with served(small, enable_lora=True) as llm:
        require_same(said(llm, lora_request=LoRARequest("ours", 1, str(tmp_path / "adapter"))), theirs)


def test_an_adapter_of_factors_is_refused_with_what_to_do(small, tmp_path):
    from vllm.lora.request import LoRARequest

    with_adapter(load(small), tmp_path / "adapter")
    with serving(small, enable_lora=True) as llm, pytest.raises(LayershareError) as error:
        llm.llm_engine.add_lora(LoRARequest("ours", 1, str(tmp_path / "adapter")))
    assert str(error.value) == (
        f"The adapter in '{tmp_path / 'adapter'}' is one of factors, which vLLM cannot add it to: merge it into its "
        "model first (in Python: PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder))."
    )


def refused(folder: Path, **options: Any) -> str:
    """The sentence with which vLLM refuses a folder."""
    with pytest.raises(LayershareError) as error, serving(folder, **options):
        pass
    return str(error.value)


def test_what_cannot_be_served_is_refused_with_what_to_do(tokenizer, words, tmp_path):
    options: dict[str, Any] = {"keep": 0.85, "of": "targets", "blocks": 8, "length": 32}
    layershare.compress(
        tiny_model("llama", config=config_of("llama")),
        tokenizer,
        method="slicegpt",
        text=words,
        folder=tmp_path / "sliced",
        **options,
    )
    assert "vLLM cannot serve a sliced model" in refused(tmp_path / "sliced")
    save(compressed("gpt2"), tmp_path / "gpt2")
    sentence = refused(tmp_path / "gpt2")
    assert sentence.startswith("vLLM cannot serve the factors of 'h.0.attn.c_attn', a Conv1D layer: ")
    assert "`layershare export --to dense`" in sentence
    save(compressed("bloom", config=config_of("bloom")), tmp_path / "bloom")
    assert "h.0.self_attention.query_key_value' while it loads them, which" in refused(tmp_path / "bloom")
    save(of_all_kinds(), tmp_path / "dropped")
    sentence = refused(tmp_path / "dropped", enable_lora=True)
    assert sentence.startswith("Parts of this model were dropped, and vLLM would add an adapter in their place: serve ")


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    save(compressed("llama", config=config_of("llama")), tmp_path / "small")
    weights = tmp_path / "small" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.0.self_attn.q_proj.basis.weight"]
    save_file(tensors, weights, {"format": "pt"})
    assert "is not as it was written: 'model.safetensors' is cut off" in refused(tmp_path / "small")
    (tmp_path / "small" / "manifest.json").unlink()
    assert refused(tmp_path / "small") == (
        "The checkpoint lacks the tensor 'layers.0.self_attn.q_proj.basis.weight': fetch or write it again."
    )


def test_processes_that_cannot_share_a_model_are_refused(tmp_path):
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.linear import LinearBase

    class Bare(LinearBase):
        def __init__(self) -> None:
            nn.Module.__init__(self)

    save(compressed("llama", config=config_of("llama", intermediate_size=57)), tmp_path / "small")
    register_here(tmp_path / "small")
    config = EngineArgs(str(tmp_path / "small"), dtype="float32", tensor_parallel_size=2).create_engine_config()
    with set_current_vllm_config(config), pytest.raises(LayershareError) as error:
        config.quant_config.get_quant_method(Bare(), "model.layers.0.self_attn.qkv_proj")
    assert "is 128 × 57, which 2 processes cannot share: take a tensor-parallel size" in str(error.value)


def test_a_vllm_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    save(compressed("llama", config=config_of("llama")), tmp_path / "small")
    monkeypatch.setattr("vllm.__version_tuple__", (0, 31, 1))
    assert "(it is too old): install vLLM 0.32, or serve what `layershare export --to dense` makes." in refused(
        tmp_path / "small"
    )


# What follows is last, because vLLM then changes transformers' classes for good.


@pytest.mark.parametrize("family", FAMILIES_BY_TRANSFORMERS)
def test_a_family_that_vllm_has_no_class_for_says_the_same(family, tmp_path):
    save(compressed(family, config=config_of(family)), tmp_path / "small")
    with served(tmp_path / "small"):
        pass


def test_vllm_s_transformers_backend_serves_the_same(tmp_path):
    save(of_all_kinds(attention_bias=True, mlp_bias=True), tmp_path / "small")
    with served(tmp_path / "small", model_impl="transformers"):
        pass
