"""Models of others: what is wrong with their files is one sentence for whoever opens them; no code of theirs runs."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import layershare
from layershare.api import evaluate_folder
from layershare.errors import LayershareError
from layershare.evaluate.generate import continue_text
from layershare.exporting import export
from layershare.job import prepare
from layershare.model.checked import ENTRIES
from layershare.model.hub import load
from layershare.model.source import read_config, read_tokenizer
from layershare.model.weights import Weights
from layershare.recipe import make_recipe
from layershare.run import run
from layershare.store import MANIFEST, write_json
from tests.families import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")

Spoil = Callable[[Path], Any]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
FILE = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory, tokenizer, words) -> Path:
    """A folder with a Llama, a GPT-2 and a compressed Llama, each with a tokenizer, and a text."""
    root = tmp_path_factory.mktemp("originals")
    (root / "text.txt").write_text("\n".join(words))
    for family in ("llama", "gpt2"):
        tiny_model(family).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
    calibration = {"text": str(root / "text.txt"), "blocks": 8, "length": 32}
    run(
        make_recipe({"model": str(root / "llama"), "method": "basis-sharing", "calibration": calibration}),
        root / "ours",
        pages=False,
    )
    return root


@pytest.fixture
def spoilt(originals, tmp_path) -> Callable[..., Path]:
    """A copy of one of these models that a function has been let at."""

    def copied(spoil: Spoil, of: str = "llama") -> Path:
        shutil.copytree(originals / of, tmp_path / "model", ignore=shutil.ignore_patterns(MANIFEST))
        spoil(tmp_path / "model")
        return tmp_path / "model"

    return copied


def config(**changes: Any) -> Spoil:
    """Changes what config.json says; None takes a key out."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in values.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return spoil


def ours(**changes: Any) -> Spoil:
    """Changes the quantization_config of a compressed model."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        for key, change in changes.items():
            entries = values["quantization_config"]
            entries[key] = change(entries[key]) if callable(change) else change
        (folder / "config.json").write_text(json.dumps(values))

    return spoil


def content(name: str, text: str | bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        state = load_file(folder / FILE)
        change(state)
        save_file(state, folder / FILE, {"format": "pt"})

    return spoil


def index(listed: Any, of: str = FILE) -> Spoil:
    """An index in place of the weights, which lie beside the model's folder; `listed` is made from their names."""

    def spoil(folder: Path) -> None:
        names = list(load_file(folder / FILE))
        shutil.move(folder / FILE, folder.parent / "secret.safetensors")
        (folder / f"{of}.index.json").write_text(json.dumps(listed(folder, names) if callable(listed) else listed))

    return spoil


def mapped(to: str | Callable[[Path], str]) -> Callable[[Path, list[str]], Any]:
    """An index that names one file for all tensors."""
    return lambda folder, names: {
        "metadata": {},
        "weight_map": dict.fromkeys(names, to if isinstance(to, str) else to(folder)),
    }


def header(text: Any, data: bytes = b"") -> Spoil:
    """A safetensors file of this header and data."""
    encoded = text if isinstance(text, bytes) else json.dumps(text).encode()
    return content(FILE, struct.pack("<Q", len(encoded)) + encoded + data)


def pickled(write: Callable[[Path, dict[str, torch.Tensor]], Any]) -> Spoil:
    """A PyTorch checkpoint in place of the safetensors."""

    def spoil(folder: Path) -> None:
        state = load_file(folder / FILE)
        (folder / FILE).unlink()
        write(folder / "pytorch_model.bin", state)

    return spoil


def linked(folder: Path) -> None:
    index(mapped("link.safetensors"))(folder)
    (folder / "link.safetensors").symlink_to("../secret.safetensors")


class Code:
    """What runs when it is unpickled carelessly."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def refused(folder: Path, said: str) -> None:
    """Everyone who opens the model says the same, in one sentence."""
    for opened in (load, lambda name: Weights.open(name, folder.parent / "scratch").require_sound()):
        with pytest.raises(LayershareError, match=said) as error:
            opened(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (content("config.json", "null"), "it holds null, not an object"),
        (content("config.json", "[1]"), "it holds a list, not an object"),
        (content("config.json", "[" * 100_000), "it is nested too deeply"),
        (content("config.json", b'{"model_type": "ll\xe4ma"}'), "it is not UTF-8 text"),
        (content("config.json", LFS), "git-lfs pointer"),
        (config(model_type=None), "its model_type is None"),
        (config(model_type=["llama"]), "its model_type is"),
        (config(model_type="llamma"), "llamma"),
        (config(model_type="t5"), "t5|Unrecognized|T5"),
        (config(architectures=5), "its architectures are not a list of names"),
        (config(architectures=[5]), "its architectures are not a list of names"),
        (config(dtype="foo"), "its dtype is 'foo', none of float32, float16, bfloat16"),
        (config(dtype=None, torch_dtype="int8"), "its torch_dtype is 'int8'"),
        (config(num_attention_heads=0), "its num_attention_heads is 0, no number from 1"),
        (config(num_attention_heads=5), "not a multiple of the number of attention heads"),
        (config(num_attention_heads="4"), "its num_attention_heads is '4'"),
        (config(num_key_value_heads=0), "its num_key_value_heads is 0"),
        (config(head_dim=-8), "its head_dim is -8"),
        (config(num_hidden_layers=3000), "its num_hidden_layers is 3000, no number from 1 to 512"),
        (config(num_hidden_layers=10**9), "its num_hidden_layers is 1000000000"),
        (config(num_hidden_layers=True), "its num_hidden_layers is True"),
        (config(num_hidden_layers=500), "asks for 500 layers, but its weights have 4"),
        (config(hidden_size=0), "its hidden_size is 0"),
        (config(hidden_size=float("inf")), "its hidden_size is inf|its hidden_size is Infinity"),
        (config(vocab_size=0), "its vocab_size is 0"),
        (config(vocab_size=10**12), "its vocab_size is 1000000000000"),
        (config(max_position_embeddings=0), "its max_position_embeddings is 0"),
        (config(intermediate_size=-1), "its intermediate_size is -1"),
        (config(rms_norm_eps=float("nan")), "its rms_norm_eps is nan"),
        (config(rms_norm_eps=-1), "its rms_norm_eps is -1"),
        (config(rope_parameters={"rope_type": "default", "rope_theta": 0}), "its rope_theta is 0"),
        (config(hidden_act="foo"), "foo"),
        (config(auto_map=5), "its auto_map does not name classes"),
        (config(transformers_weights="../secret.safetensors"), "secret"),
        (config(id2label={str(i): "x" for i in range(ENTRIES)}), "values, which no model's does"),
    ],
)
def test_configs(spoilt, spoil, said):
    folder = spoilt(spoil)
    refused(folder, said)
    with pytest.raises(LayershareError):
        prepare(make_recipe({"model": str(folder)}))


@pytest.mark.parametrize("key", ["n_layer", "num_hidden_layers"])
def test_sizes_by_the_names_of_a_family(spoilt, key):
    refused(spoilt(config(**{key: 10**9}), "gpt2"), f"its {key} is 1000000000")


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({}, "names no method that transformers knows"),
        (5, "names no method"),
        ([], "names no method"),
        ({"group_size": 64, "bits": 4}, "names no method"),
        ({"quant_method": None}, "names no method"),
        ({"load_in_8bit": True}, "is quantized with 'bitsandbytes'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "is quantized with 'bitsandbytes'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "is quantized with 'gptq'"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, "is quantized with 'awq'"),
        ({"quant_method": "magic"}, "is quantized with 'magic'"),
    ],
)
def test_what_others_quantized(spoilt, originals, quantization, said):
    folder = str(spoilt(config(quantization_config=quantization)))
    test = make_recipe({"model": folder, "evaluation": {"text": str(originals / "text.txt"), "blocks": 1}})
    for verb in (
        lambda: prepare(make_recipe({"model": folder})),
        lambda: evaluate_folder(folder, None, test),
        lambda: continue_text(folder, "abc"),
        lambda: export(folder, Path(folder).parent / "dense", to="dense"),
    ):
        with pytest.raises(LayershareError, match=rf"{said}.*start from the unquantized weights"):
            verb()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compositions": lambda found: found[:1] * 2000}, "is listed twice"),
        ({"compositions": lambda found: found[:1] * 30_000}, "values, which no model's does"),
        ({"compositions": 5}, "not iterable"),
        ({"compositions": [5]}, "quantization_config of config.json cannot be used"),
        ({"compositions": lambda found: [{**found[0], "members": 5}]}, "not iterable"),
        ({"compositions": lambda found: [{**found[0], "terms": []}]}, "do not make its matrices"),
        ({"version": "../../x"}, "has version '../../x'"),
        ({"version": True}, "has version True"),
        ({"version": -1}, "has version -1"),
        ({"compression": lambda notes: json.loads('{"a":' * 100 + "1" + "}" * 100)}, "nested more than 64 levels"),
        ({"compression": 5}, "a `compression` that is not ours"),
        ({"compression": {"model": 5}}, "a `compression` that is not ours"),
        ({"slice": {"width": "x"}}, "it lacks 'stream'"),
    ],
)
def test_our_own_entries(spoilt, change, said):
    folder = spoilt(ours(**change), "ours")
    with pytest.raises(LayershareError, match=said):
        load(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (content(FILE, LFS), f"'{FILE}' is a git-lfs pointer, not the file itself; run git lfs pull"),
        (content(FILE, b""), f"weight file '{FILE}'"),
        (content(FILE, b"<!DOCTYPE html><html>Not found</html>"), f"weight file '{FILE}'"),
        (lambda folder: os.truncate(folder / FILE, 4000), f"weight file '{FILE}'"),
        (header([1]), f"weight file '{FILE}'"),
        (header(b'{"a":' * 50_000), f"weight file '{FILE}'"),
        (
            header({name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in "ab"}, b"\0" * 16),
            f"weight file '{FILE}'",
        ),
        (header({"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**63]}}), f"weight file '{FILE}'"),
        (index([]), "it holds a list, not an object"),
        (index({"metadata": {}}), "it has no weight_map"),
        (index({"weight_map": []}), "it has no weight_map"),
        (index({"weight_map": {"a": 5}}), "it names no file for 'a'"),
        (index(mapped("nope.safetensors")), "it names 'nope.safetensors', which is not there"),
        (index(mapped("../secret.safetensors")), "'../secret.safetensors' is outside of the model's folder"),
        (index(mapped("x/../../secret.safetensors")), "is outside of the model's folder"),
        (index(mapped(lambda folder: str(folder.parent / "secret.safetensors"))), "is outside of the"),
        (index(mapped("../secret.bin"), "pytorch_model.bin"), "is outside of the model's folder"),
        (index([], "pytorch_model.bin"), "it holds a list, not an object"),
        (linked, "'link.safetensors' leads out of the model's folder"),
        (pickled(lambda file, state: file.write_bytes(LFS)), "'pytorch_model.bin' is a git-lfs pointer"),
        (pickled(lambda file, state: (torch.save(state, file), os.truncate(file, 9000))), "'pytorch_model.bin'"),
        (
            pickled(lambda file, state: torch.save({**state, "x": Code()}, file)),
            "it may hold code, of which nothing was",
        ),
        (pickled(lambda file, state: torch.save([1], file)), "something else than tensors by their names"),
        (pickled(lambda file, state: torch.save({"model": state}, file)), "something else than tensors by their"),
    ],
)
def test_weight_files(spoilt, monkeypatch, spoil, said):
    folder = spoilt(spoil)
    monkeypatch.chdir(folder.parent)
    refused(folder, said)
    with pytest.raises(LayershareError) as error:
        prepare(make_recipe({"model": str(folder)}))
    assert "weights_only" not in str(error.value)
    assert not Path("ran").exists()


def test_models_of_the_hub_come_through_its_cache(originals, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789" * 4
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / commit, tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text(commit)
    for number, file in enumerate((originals / "llama").iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert load(snapshot).num_parameters() == tiny_model("llama").num_parameters()
    assert load("a/b").num_parameters() == tiny_model("llama").num_parameters()
    read_tokenizer("a/b")
    (snapshot / FILE).unlink()
    (snapshot / FILE).symlink_to(originals / "llama" / FILE)
    for name in (snapshot, "a/b"):
        with pytest.raises(LayershareError, match="leads out of the model's folder"):
            load(name)
    with pytest.raises(LayershareError, match="the hub does not have it or cannot be reached"):
        load("a/c")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_is_to_be_merged_first(spoilt, file, alone):
    def spoil(folder: Path) -> None:
        (folder / file).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
        if alone:
            (folder / "config.json").unlink()

    folder = spoilt(spoil)
    if alone and file != "adapter_config.json":
        refused(folder, "is not a model")
    else:
        refused(folder, r"holds an adapter .*merge it into its model first .*merge_and_unload")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tokenizer.json", "[1]", "The tokenizer of"),
        ("tokenizer.json", "garbage", "The tokenizer of"),
        ("tokenizer.json", LFS, "The tokenizer.json of .*is a git-lfs pointer"),
        ("tokenizer_config.json", "[1]", "The tokenizer_config.json of .*it holds a list"),
        ("tokenizer_config.json", "garbage", "The tokenizer_config.json of .*it is not JSON"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}', "The tokenizer of"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', "its model_max_length is 'x'"),
        ("special_tokens_map.json", "null", "it holds null"),
    ],
)
def test_tokenizers(spoilt, name, text, said):
    with pytest.raises(LayershareError, match=said) as error:
        read_tokenizer(spoilt(content(name, text)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"temperature": "hot"}', "its temperature is 'hot'"),
        ('{"do_sample": true, "top_k": 1.5}', "its top_k is 1.5"),
        ('{"eos_token_id": ["a"]}', "its eos_token_id is"),
        ('{"num_beams": -3}', "its num_beams is -3"),
        ("[1]", "it holds a list, not an object"),
        ("garbage", "it is not JSON"),
    ],
)
def test_generation_configs(spoilt, text, said):
    folder = spoilt(content("generation_config.json", text))
    refused(folder, rf"The generation_config\.json of .*{said}.*: repair or delete it")


def head(**extra: torch.Tensor) -> Spoil:
    """A head that was trained on a model with tied embeddings."""

    def spoil(folder: Path) -> None:
        config(tie_word_embeddings=True)(folder)
        tensors(lambda state: (state.pop("lm_head.weight"), state.update(extra)))(folder)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "of", "said"),
    [
        (head(**{"score.weight": torch.ones(1, 32)}), "llama", "1 tensors .* among them 'score.weight'"),
        (
            head(**{"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}),
            "llama",
            "2 tensors .* among them 'v_head.summary.bias'",
        ),
        (tensors(lambda state: state.update({"score.weight": torch.ones(1, 32)})), "gpt2", "'score.weight'"),
        (config(architectures=["LlamaForSequenceClassification"]), "llama", "no causal language model"),
        (tensors(lambda state: state.update({UP: torch.ones(3, 32)})), "llama", rf"'{UP}' is \[3, 32\] in the check"),
        (config(num_hidden_layers=3), "llama", "9 tensors .* among them 'model.layers.3.input_layernorm.weight'"),
        (tensors(lambda state: state.update({"score.weight": torch.ones(1, 32)})), "ours", "'score.weight'"),
    ],
)
def test_what_would_be_lost_is_named(spoilt, spoil, of, said):
    refused(spoilt(spoil, of), said)


@pytest.mark.parametrize(("of", "layers"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_a_plan_is_of_the_model_that_the_weights_are_of(spoilt, of, layers):
    folder = spoilt(config(**{layers: 3}), of)
    with pytest.raises(LayershareError, match=r"tensors that its language model does not, among them '.*3\."):
        prepare(make_recipe({"model": str(folder)}))
    config(**{layers: 4, "vocab_size": 70})(folder)
    with pytest.raises(LayershareError, match=r"but config.json makes it"):
        prepare(make_recipe({"model": str(folder)}))


def test_buffers_of_older_checkpoints_are_passed_over(spoilt):
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool) for i in range(4)}
    scales = {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(4)}
    folder = spoilt(tensors(lambda state: state.update(masks | scales)), "gpt2")
    load(folder)
    Weights.open(folder, folder.parent / "scratch").require_sound()


def test_a_model_in_memory_that_is_no_language_model(tokenizer, words):
    config = tiny_model("llama").config
    config.tie_word_embeddings, config.pad_token_id = True, 0
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(LayershareError, match="A LlamaForSequenceClassification does not predict"):
        layershare.compress(model, tokenizer, text=words)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_numbers_of_theirs(spoilt, dtype):
    folder = spoilt(tensors(lambda state: state.update({UP: state[UP].to(dtype)})))
    refused(folder, rf"'{UP}' is of type {str(dtype).removeprefix('torch.')}, which weights are not")


def test_weights_in_memory_that_are_no_numbers(tokenizer, words):
    model = tiny_model("llama")
    model.get_parameter(UP).requires_grad = False
    model.get_parameter(UP).data = model.get_parameter(UP).data.to(torch.int8)
    with pytest.raises(LayershareError, match=rf"'{UP}' of the model is quantized \(int8\)"):
        layershare.compress(model, tokenizer, text=words, blocks=8, length=32)


def compressed(folder: Path, originals: Path, **values: Any) -> Path:
    """What a run leaves beside the model's folder."""
    calibration = {"text": str(originals / "text.txt"), "blocks": 8, "length": 32}
    out = folder.parent / "out"
    run(
        make_recipe({"model": str(folder), "method": "basis-sharing", "calibration": calibration, **values}),
        out,
        pages=False,
    )
    return out


def stored_types(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / FILE).values() if tensor.numel()}


@pytest.mark.parametrize(
    ("stored", "values", "expected"),
    [
        (torch.bfloat16, {"dtype": "float32"}, {torch.bfloat16}),
        (torch.float16, {}, {torch.float16}),
        (torch.float32, {"store_dtype": "bfloat16"}, {torch.bfloat16}),
        (torch.float16, {"dtype": "float32", "store_dtype": "float32"}, {torch.float32}),
    ],
)
@pytest.mark.parametrize("says", [True, False])
def test_stored_as_the_original_and_planned_as_stored(spoilt, originals, stored, values, expected, says):
    def spoil(folder: Path) -> None:
        tensors(lambda state: state.update({name: tensor.to(stored) for name, tensor in state.items()}))(folder)
        config(dtype=str(stored).removeprefix("torch.") if says else None)(folder)

    folder = spoilt(spoil)
    shown = prepare(make_recipe({"model": str(folder), "method": "basis-sharing", "keep": "60KB", **values})).plan
    out = compressed(folder, originals, keep="60KB", **values)
    assert stored_types(out) == expected
    assert shown is not None
    assert json.loads((out / "plan.json").read_text()) == json.loads(shown.to_json())
    assert (out / FILE).stat().st_size == shown.after.all.bytes
    assert read_config(out).dtype == next(iter(expected))


def test_types_of_single_tensors_stay(spoilt, originals):
    folder = spoilt(tensors(lambda state: state.update({UP: state[UP].half()})))
    before, after = load_file(folder / FILE), load_file(compressed(folder, originals, method="shortgpt") / FILE)
    assert {tensor.dtype for tensor in before.values()} == {tensor.dtype for tensor in after.values()}


CONFIGURATION = (
    "import os\nos.makedirs('ran', exist_ok=True)\nfrom transformers import LlamaConfig\n\n\n"
    "class XConfig(LlamaConfig):\n"
)
MODELING = (
    "from transformers import LlamaForCausalLM\n\nfrom .configuration_x import XConfig\n\n\n"
    "class XForCausalLM(LlamaForCausalLM):\n    config_class = XConfig\n"
)


def with_code(model_type: str) -> Spoil:
    """A model whose config names code that comes with it."""

    def spoil(folder: Path) -> None:
        code = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
        config(model_type=model_type, auto_map=code)(folder)
        (folder / "configuration_x.py").write_text(f"{CONFIGURATION}    model_type = '{model_type}'\n")
        (folder / "modeling_x.py").write_text(MODELING)

    return spoil


@pytest.mark.parametrize("method", ["basis-sharing", "shortgpt", "slicegpt"])
def test_results_do_not_name_code_that_did_not_come_along(spoilt, originals, monkeypatch, method):
    folder = spoilt(with_code("llama"))
    values = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", values | {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}})
    monkeypatch.chdir(folder.parent)
    results = [compressed(folder, originals, method=method)]
    if method != "slicegpt":
        results.append(folder.parent / "dense")
        export(results[0], results[1], to="dense")
    for result in results:
        for trusted in (True, False):
            loaded: Any = AutoModelForCausalLM.from_pretrained(result, trust_remote_code=trusted)
            assert type(loaded).__name__ == "LlamaForCausalLM"
            AutoTokenizer.from_pretrained(result, trust_remote_code=trusted)
    export(folder, folder.parent / "copy", to="dense")
    assert "auto_map" not in json.loads((folder.parent / "copy" / "config.json").read_text())
    assert not Path("ran").exists()


def test_code_of_others_is_run_only_where_that_is_allowed(spoilt, originals, monkeypatch):
    folder = spoilt(with_code("our-x"))
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent / "modules"))
    monkeypatch.syspath_prepend(folder.parent / "modules")
    for verb in (load, read_config, lambda name: continue_text(name, "abc"), lambda name: compressed(name, originals)):
        with pytest.raises(LayershareError, match=r"needs Python code that comes with it.*--trust-remote-code"):
            verb(folder)
    assert not Path("ran").exists()
    out = compressed(folder, originals, trust_remote_code=True)
    assert Path("ran").exists()
    Path("ran").rmdir()
    shutil.rmtree(folder)
    small: Any = load(out, trust_remote_code=True)
    assert type(small).__name__ == "XForCausalLM"
    assert type(small.model.layers[0].self_attn.q_proj).__name__ == "ComposedLinear"
    with pytest.raises(LayershareError, match="--trust-remote-code"):
        load(out)
