"""`layershare quantize`: folders in, folders out, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import layershare
from layershare.errors import LayershareError
from layershare.exporting import export
from layershare.job import prepare
from layershare.model.describe import describe
from layershare.model.hub import load, store_as
from layershare.model.layers import QuantizedLinear
from layershare.model.source import read_config, read_tokenizer
from layershare.plan.budget import measure as sizes_of
from layershare.plan.edits import Place, Quantize
from layershare.quantizing import quantize_folder
from layershare.recipe import Calibration, make_recipe
from layershare.report.listing import listing
from layershare.run import run as layershare_run
from tests.families import tiny_model, tokens
from tests.healing.tiny import compress_tiny, heal

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")


@pytest.fixture
def small(tmp_path, tokenizer, words, monkeypatch) -> Path:
    """A compressed tiny model in `small` beside the dense one, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return compress_tiny(tmp_path, tokenizer, words)


def results(folder: Path | str) -> dict[str, Any]:
    return json.loads((Path(folder) / "results.json").read_text())


def stored_bytes(folder: Path | str, *, ours: bool) -> int:
    """The bytes of the matrices in the blocks of a folder's model."""
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    inside = {name: tensor for name, tensor in state.items() if ".layers." in name and "norm" not in name}
    assert any(name.endswith("codes") for name in inside) == ours
    return sum(tensor.nbytes for tensor in inside.values())


def test_a_compressed_model_is_quantized(small, run):
    code, out, err = run(
        "quantize", "small", "-o", "q4", "--basis-bits", "8", "--group", "16",
        "--text", "text.txt", "--blocks", "8", "--length", "32",
    )  # fmt: skip
    assert code == 0, err
    assert "The quantized model is in q4." in out
    layershare.verify("q4")
    note, before, after = results("q4")["quantization"], results("small"), results("q4")
    assert (note["bits"], note["basis_bits"], note["group"], note["text"]["length"]) == (4, 8, 16, 32)
    assert note["before"] == before["after"]["targets"]["bytes"] == stored_bytes("small", ours=False)
    assert note["after"] == after["after"]["targets"]["bytes"] == stored_bytes("q4", ours=True)
    assert after["after"]["all"]["bytes"] == Path("q4/model.safetensors").stat().st_size
    assert after["after"]["all"]["parameters"] == before["after"]["all"]["parameters"]
    for name in ("plan.json", "recipe.yaml"):
        assert Path("q4", name).read_bytes() == Path("small", name).read_bytes()
    card = Path("q4/README.md").read_text()
    assert "stored as 4-bit numbers (bases as 8-bit ones), 16 with one scale, by GPTQ on" in card
    assert "No quality was measured" in card
    assert "bits: 4" in Path("q4/quantize.yaml").read_text()
    assert "4 bits" in "".join(str(cell) for column in listing(Path())[0].columns for cell in column.cells)
    model, tokenizer = AutoModelForCausalLM.from_pretrained("q4"), AutoTokenizer.from_pretrained("q4")
    assert len(tokenizer) == len(read_tokenizer("small"))
    code, _, err = run("export", "q4", "-o", "plain", "--to", "dense")
    assert code == 0, err
    plain: Any = AutoModelForCausalLM.from_pretrained("plain")
    torch.testing.assert_close(plain(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scheme", "group"), [("nvfp4", 16), ("mxfp4", 32)])
def test_numbers_may_be_floats_of_four_bits(scheme, group, small, run):
    text = ["--text", "text.txt", "--blocks", "8", "--length", "32"]
    code, _, err = run("quantize", "small", "-o", "q4", "--scheme", scheme, *text)
    assert code == 0, err
    layershare.verify("q4")
    note = results("q4")["quantization"]
    assert (note["bits"], note["basis_bits"], note["group"], note["scheme"]) == (4, 4, group, scheme)
    assert note["after"] == results("q4")["after"]["targets"]["bytes"] == stored_bytes("q4", ours=True)
    assert f"stored as {scheme} numbers, {group} with one scale" in Path("q4/README.md").read_text()
    assert f"scheme: {scheme}" in Path("q4/quantize.yaml").read_text()
    found, expected = (load(each)(tokens()).logits for each in ("q4", "small"))
    assert 0 < (found - expected).abs().max() < 0.5 * expected.abs().max()
    text = {"text": "text.txt", "blocks": 8, "length": 32}
    recipe = {"model": "dense", "method": "svd-llm", "keep": 0.8, "calibration": text, "quantize": {"scheme": scheme}}
    done = layershare_run(make_recipe(recipe), "floats")
    assert done.after.targets.bytes == stored_bytes("floats", ours=True)
    assert json.loads(Path("floats/plan.json").read_text())["edits"][-1]["scheme"] == scheme


def test_a_dense_model_is_quantized_in_python(small):
    model = layershare.quantize("dense", "q8", bits=8, group=32)
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    layershare.verify("q8")
    expected: Any = load("dense")
    assert 0 < (model(tokens()).logits - expected(tokens()).logits).abs().max() < 0.1
    text = ["".join(map(str, range(400)))] * 4
    better = layershare.quantize("dense", "q4", text=text, blocks=4, length=32)
    assert results("q4")["quantization"]["text"]["blocks"] == 4
    assert torch.equal(better(tokens()).logits, load("q4")(tokens()).logits)


@pytest.mark.parametrize(("method", "options"), [("basis-sharing", {}), ("delta", {"protect": 0})])
def test_a_recipe_may_say_that_the_result_is_quantized(method, options, small):
    """It is what quantizing the result in floats on the same text gives, and the plan says so, and counts it."""
    Path("one.txt").write_text(Path("text.txt").read_text())
    text = {"text": "one.txt", "blocks": 8, "length": 32}
    recipe = {"model": "dense", "method": method, "options": options, "keep": 0.8, "of": "targets", "calibration": text}
    layershare_run(make_recipe(recipe), "floats")
    how: dict[str, Any] = {"bits": 3, "basis_bits": 4, "group": 16}
    done = layershare_run(make_recipe({**recipe, "quantize": how}), "integers")
    quantize_folder("floats", "after", **how, calibration=make_recipe(recipe).calibration)
    found, expected = (load(each).state_dict() for each in ("integers", "after"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert done.after.targets.bytes == stored_bytes("integers", ours=True)
    assert done.after.targets.parameters == results("floats")["after"]["targets"]["parameters"]
    assert {edit["bits"] for edit in json.loads(Path("integers/plan.json").read_text())["edits"][-1:]} == {3}


@pytest.mark.parametrize(("bits", "basis_bits"), [(4, 2), (8, 4), (4, 8), (3, 5)])
@pytest.mark.parametrize("method", ["svd-llm", "basis-sharing"])
def test_a_size_is_used_up_where_bases_have_other_bits(method, bits, basis_bits):
    shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6}
    config = LlamaConfig(**shape, num_attention_heads=8, vocab_size=4000, dtype="bfloat16")
    how = {"bits": bits, "basis_bits": basis_bits}
    plan = prepare(make_recipe({"model": "none", "method": method, "keep": "10MB", "quantize": how}), config).plan
    assert plan is not None
    assert 0.99 * 10e6 <= plan.after.all.bytes <= 10e6


@pytest.mark.parametrize("method", ["svd-llm", "auto"])
def test_a_size_is_one_of_integers_where_the_recipe_quantizes(method, small):
    spec = describe(read_config("dense"))
    everywhere = Quantize(tuple(Place(linear.role, linear.layer) for linear in spec.linears), 4, 4)
    whole = sizes_of(spec, [everywhere]).targets.bytes
    text = {"text": "text.txt", "blocks": 16, "length": 32}
    values = {"model": "dense", "method": method, "keep": f"{0.8 * whole / 1000}KB", "of": "targets", "refit": False}
    done = layershare_run(make_recipe({**values, "calibration": text, "quantize": {}}), "small-4bit")
    assert 0.75 * whole < done.after.targets.bytes <= 0.8 * whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize": {"bits": 7}}, "Unknown number of bits '7'"),
        ({"quantize": {"group": 0}}, "'quantize.group' in the recipe"),
        ({"quantize": {"scheme": "fp4"}}, "'quantize.scheme' in the recipe"),
        ({"quantize": {"scheme": "mxfp4", "bits": 3}}, "mxfp4 has 4 bits in groups of 32"),
        ({"quantize": {"scheme": "mxfp4", "basis_bits": 8}}, "mxfp4 has 4 bits in groups of 32"),
        ({"method": "shortgpt"}, "'shortgpt' removes parts of the model; compress first"),
        ({"method": "slicegpt"}, "'slicegpt' removes parts of the model; compress first"),
        ({"method": "auto", "options": {"bits": [4]}}, "Bits are planned already"),
        ({"plan": "plan.json"}, "A plan says itself what is quantized"),
    ],
)
def test_what_a_recipe_cannot_quantize_is_refused(changes, message, small):
    values = {"model": "dense", "method": "svd-llm", "quantize": {}, "calibration": {"text": "text.txt"}, **changes}
    with pytest.raises(LayershareError, match=message):
        layershare_run(make_recipe(values), "never")
    assert not Path("never").exists()


@pytest.mark.parametrize("text", [None, "text.txt"])
def test_what_is_not_quantized_keeps_its_type_and_its_numbers(text, small):
    model = AutoModelForCausalLM.from_pretrained("dense", dtype=torch.bfloat16)
    model.model.norm.float()
    with torch.no_grad():
        model.model.norm.weight += torch.linspace(0, 1e-3, 32)
    model.save_pretrained("mixed")
    read_tokenizer("dense").save_pretrained("mixed")
    calibration = None if text is None else Calibration(text=text, blocks=4, length=16)
    layershare_run(make_recipe({"model": "mixed", "method": "svd", "keep": 0.8}), "few")
    quantize_folder("few", "out", bits=8, calibration=calibration)
    export("few", "whole", to="dense")
    for folder in ("few", "out", "whole"):
        state = load_file(Path(folder) / "model.safetensors")
        assert torch.equal(state["model.norm.weight"], model.model.norm.weight)
        assert state["model.embed_tokens.weight"].dtype == torch.bfloat16
        assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").config.dtype == torch.bfloat16


def test_tied_tensors_have_the_type_of_the_one_that_is_stored():
    model = tiny_model("gemma")
    for stored in ("model.embed_tokens.weight", "lm_head.weight"):
        store_as(model, {stored: torch.empty(0, dtype=torch.float32)}, torch.bfloat16)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert {model.lm_head.weight.dtype, model.model.norm.weight.dtype} == {torch.float32, torch.bfloat16}


def test_two_commands_do_not_write_into_one_folder(small, monkeypatch):
    def other(needs):
        monkeypatch.undo()
        monkeypatch.chdir(small.parent)
        export("small", "out", to="dense")

    monkeypatch.setattr("layershare.quantizing.require_disk", other)
    with pytest.raises(LayershareError, match="Another command has written to 'out' meanwhile; name another folder"):
        quantize_folder("small", "out", bits=4)
    assert not (Path("out") / "quantize.yaml").exists()
    assert layershare.verify("out").files


def test_a_dense_model_of_integers_trains(small):
    quantize_folder("small", "out", bits=8)
    model = layershare.load("out").dequantize()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_same_input_gives_the_same_bytes(small):
    for name in ("one", "two"):
        layershare.quantize("small", name, text="text.txt", blocks=8, length=32)
    assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()


def test_a_healed_model_keeps_what_is_known_of_it(small):
    Path("other.txt").write_text(Path("text.txt").read_text()[::-1])
    heal(small, Path("healed"), evaluation={"text": "other.txt", "blocks": 2, "length": 16})
    layershare.quantize("healed", "q8", bits=8)
    assert Path("q8/heal.yaml").is_file()
    assert "evaluation" in results("healed")["healing"]
    assert "evaluation" not in results("q8")["healing"]
    assert "## Healing" in Path("q8/README.md").read_text()
    with pytest.raises(LayershareError, match="not empty"):  # it is no longer what that healing made
        heal(small, Path("q8"), evaluation={"text": "other.txt", "blocks": 2, "length": 16})


REFUSED = {
    ("quantize", "q8", "-o", "again"): "'q8' is quantized already: give the model that it was made from.",
    ("compress", "dense", "-o", "new", "-m", "svd", "--bits", "4"): "'svd' does not plan bits: `--set quantize.bits=4`",
    ("quantize", "small", "-o", "again", "--bits", "7"): "Unknown number of bits '7'. Known: 2, 3, 4, 5, 6, 8.",
    ("quantize", "small", "-o", "again", "--basis-bits", "16"): "Unknown number of bits '16'.",
    ("quantize", "small", "-o", "again", "--scheme", "fp4"): "Unknown scheme 'fp4'. Did you mean 'nvfp4'?",
    ("quantize", "small", "-o", "again", "--scheme", "nvfp4", "--group", "64"): "leave bits and groups out.",
    ("quantize", "small", "-o", "again", "--group", "0"): "A group of 0 numbers has no scale",
    ("quantize", "small", "-o", "again", "--blocks", "8"): "name it with --text",
    ("quantize", "small", "-o", "again", "--text", "nowhere.txt"): "nowhere.txt",
    ("quantize", "small", "-o", "q8"): "The output folder 'q8' is not empty",
    ("quantize", "smal", "-o", "again"): "Unknown model 'smal'. Did you mean 'small'?",
    ("quantize", "sliced", "-o", "again"): "'sliced' is sliced",
    ("compress", "q8", "-o", "again", "-m", "svd"): "already compressed by layershare",
    ("heal", "q8", "-o", "again", "--text", "text.txt", "--length", "16"): "quantized weights do not train",
    ("heal", "q8", "-o", "again", "--text", "text.txt", "--length", "16", "--train", "full"): "do not train",
}


def test_bad_input_ends_in_one_sentence_with_nothing_written(small, run):
    layershare.quantize("small", "q8", bits=8)
    dense = load("dense")
    layershare.compress(dense, read_tokenizer("dense"), method="slicegpt", keep=0.9, text="text.txt", folder="sliced",
                        blocks=8, length=32)  # fmt: skip
    for arguments, sentence in REFUSED.items():
        code, _, err = run(*arguments)
        assert code == 2, (arguments, err)
        assert sentence in " ".join(err.split()), (arguments, err)
        assert err.strip().count("\n") <= 3
        assert not Path("again").exists()
    with pytest.raises(LayershareError, match="Unknown number of bits"):
        layershare.quantize("small", "again", bits=16)


def test_norms_of_a_quantized_model_train(small):
    layershare.quantize("small", "q8", bits=8)
    heal(Path("q8").absolute(), Path("healed"), train="norms")
    one, two = (load(name).state_dict() for name in ("q8", "healed"))
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    assert changed
    assert all("norm" in name for name in changed)


def test_gptq_is_nearer_to_the_original_than_rounding(tmp_path):
    plain = layershare.quantize("sample", tmp_path / "rounded")
    ours = layershare.quantize("sample", tmp_path / "gptq", text="stdlib", blocks=16, length=128)
    original, tokenizer = load("sample", dtype=torch.float32), read_tokenizer("sample")
    measured = {"text": "stdlib", "blocks": 4, "length": 256, "original": original}  # of another part of the text
    rounded, compensated = (layershare.measure(model.float(), tokenizer, **measured).kl for model in (plain, ours))
    assert compensated is not None
    assert rounded is not None
    assert compensated < 0.9 * rounded
