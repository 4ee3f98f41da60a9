"""A finished folder that has changed since is noticed, whatever opens it, and the fault is named."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import layershare as api
from layershare.errors import LayershareError
from layershare.store import MANIFEST
from tests.families import tiny_model
from tests.test_cli import here, layershare  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")
TEXT = ("--text", "text.txt", "--length", "64")
COMPRESS = ("compress", "dense", "-o", "small", "-m", "svd")
TENSOR = "model.layers.3.mlp.up_proj.coef.weight"
DAMAGED = f"the tensor '{TENSOR}' in 'model.safetensors' is damaged"
CHANGED = "delete its manifest.json if it was changed on purpose"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer) -> Path:
    """A compressed model."""
    folder = tmp_path_factory.mktemp("made") / "small"
    api.compress(tiny_model("llama"), tokenizer, method="svd", keep=0.5, of="targets", folder=folder)
    return folder


@pytest.fixture
def small(made, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "small"))


def place_of(file: Path, tensor: str) -> int:
    """Where a tensor's first byte is in a safetensors file."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return 8 + length + json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0]


def flip(file: Path, place: int) -> None:
    """Turn one bit of a file around."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_a_whole_folder_is_told_apart_from_what_people_changed_or_added(made, small):
    assert str(api.verify(made)).startswith(f"'{made}' is as it was written: ")
    (small / "README.md").write_text("Mine.")
    (small / "generation_config.json").unlink()
    (small / "notes.txt").write_text("Mine.")
    found = api.verify(small)
    assert found.changed == ("README.md", "generation_config.json")
    assert found.added == ("notes.txt",)
    api.load(small)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "plan.json", "recipe.yaml", "results.json", "modeling_layershare.py"]
)
def test_a_changed_or_missing_file_is_named(small, name):
    flip(small / name, 20)
    with pytest.raises(LayershareError, match=f"'{name}' has changed; .* {CHANGED}"):
        api.verify(small)
    (small / name).unlink()
    with pytest.raises(LayershareError, match=f"'{name}' is missing; "):
        api.verify(small)
    if name != "config.json":
        with pytest.raises(LayershareError, match=f"'{name}' is missing; "):
            api.load(small)


def test_faults_in_weights_are_named(small):
    file = small / "model.safetensors"
    whole = file.read_bytes()
    for damage, said in {
        whole[:-100]: f"is cut off at {len(whole) - 100:,} of {len(whole):,} bytes",
        whole[:30] + b"X" + whole[31:]: "the header of 'model.safetensors' is damaged",
        whole + b"more": "'model.safetensors' has changed",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n": "is a git-lfs pointer",
    }.items():
        file.write_bytes(damage)
        with pytest.raises(LayershareError, match=said):
            api.load(small)
    file.write_bytes(whole)
    api.load(small)
    for tensor in (TENSOR, "model.norm.weight"):
        flip(file, place_of(file, tensor))
    with pytest.raises(LayershareError, match=r"the tensor '[a-z0-9_.]+' and 1 more in 'model\.safetensors'"):
        api.load(small)


def test_every_verb_refuses_a_flipped_bit_and_rerunning_says_what_to_do(layershare, here):  # noqa: F811
    assert layershare(*COMPRESS)[0] == 0
    code, out, _ = layershare("verify", "small")
    assert (code, "'small' is as it was written" in out) == (0, True)
    flip(here / "small" / "model.safetensors", place_of(here / "small" / "model.safetensors", TENSOR))
    for arguments in (
        ("verify", "small"),
        ("eval", "small", *TEXT),
        ("eval", "dense", "--original", "small", *TEXT),
        ("export", "small", "-o", "out", "--to", "dense"),
        ("heal", "small", "-o", "out", *TEXT, "--batch-size", "4"),
        ("bench", "small", "--prompt", "8", "--rounds", "1"),
        ("generate", "small", "a"),
        COMPRESS,
    ):
        code, _, err = layershare(*arguments)
        assert (code, DAMAGED in err) == (2, True), (arguments, err)
    assert "delete the folder, so that the command can make it again, or name another one" in err
    assert not (here / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "plan.json", "results.json", "tokenizer.json"])
def test_nothing_was_done_is_not_said_of_a_damaged_folder(made, small, name):
    again = {"method": "svd", "keep": 0.5, "of": "targets", "folder": small}
    with pytest.warns(UserWarning, match="nothing was done"):
        api.compress(tiny_model("llama"), **again)
    flip(small / name, 10)
    with pytest.raises(LayershareError, match=f"'{name}' has changed; delete the folder"):
        api.compress(tiny_model("llama"), **again)
    (small / name).unlink()
    with pytest.raises(LayershareError, match=f"'{name}' is missing; delete the folder"):
        api.compress(tiny_model("llama"), **again)
    (small / MANIFEST).unlink()
    (small / "results.json").write_text("null")
    with pytest.raises(LayershareError, match=r"not empty|results\.json in .* holds null|nothing was done"):
        api.compress(tiny_model("llama"), **again)


def test_a_manifest_that_is_damaged_foreign_or_absent(small):
    file = small / MANIFEST
    whole = file.read_text()
    for damage in (whole[:-40], whole.replace('"files"', '"fi1es"'), whole.replace('"bytes"', '"bytez"', 1)):
        file.write_text(damage)
        for use in (api.verify, api.load):
            with pytest.raises(LayershareError, match=r"The manifest\.json of .* cannot be used"):
                use(small)
    for foreign in ('{"version": 1}', '{"files": ["a"]}'):
        file.write_text(foreign)
        with pytest.raises(LayershareError, match=r"manifest\.json of .* cannot be used"):  # beside our plan
            api.verify(small)
    for ours in ("plan.json", "recipe.yaml"):
        (small / ours).unlink()
    for foreign in ('{"version": 1}', '{"files": ["a"]}'):
        file.write_text(foreign)
        assert "there is nothing to check it against" in str(api.verify(small))
    file.unlink()
    assert "layershare writes one, save_pretrained does not" in str(api.verify(small))
    api.load(small)
    with pytest.raises(LayershareError, match="There is no folder"):
        api.verify(small / "nowhere")
    with pytest.raises(LayershareError, match="holds no finished model"):
        api.verify(small.parent)


def test_figures_of_a_changed_folder_are_not_told(layershare, here, small):  # noqa: F811
    results = json.loads((small / "results.json").read_text())
    results["after"]["all"]["bytes"] = 12345
    (small / "results.json").write_text(json.dumps(results))
    for command in (("ls", "."), ("report", "small", "-o", "page.html")):
        _, out, err = layershare(*command)
        assert "is not as it was written: 'results.json'" in " ".join((out + err).split())
        assert "12.3 kB" not in out
    assert not (here / "page.html").exists()


def test_a_manifest_names_no_file_outside_its_folder(small):
    manifest = json.loads((small / MANIFEST).read_text())
    manifest["files"]["../text.txt"] = {"bytes": 1, "sha256": "0"}
    (small / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(LayershareError, match="cannot be used"):
        api.verify(small)


def test_who_saves_into_the_folder_is_told_what_to_do(small):
    model = AutoModelForCausalLM.from_pretrained(small)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(small)
    with pytest.raises(LayershareError, match=f"'model.safetensors' has changed; .*{CHANGED}"):
        api.load(small)
    (small / MANIFEST).unlink()
    assert torch.equal(api.load(small).model.norm.weight, model.model.norm.weight)


def test_save_leaves_a_whole_folder_also_over_an_older_one(small, tokenizer):
    model = api.load(small)
    model.save_pretrained(small, max_shard_size="40KB")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    api.save(model, small, tokenizer)
    assert [path.name for path in small.glob("model*.safetensors*")] == ["model.safetensors"]
    assert api.verify(small).changed == ()
    assert torch.equal(api.load(small).model.norm.weight, model.model.norm.weight)


def test_export_and_heal_leave_manifests(layershare, here, small):  # noqa: F811
    assert layershare("export", "small", "-o", "out", "--to", "dense")[0] == 0
    heal = ("heal", "small", "-o", "healed", *TEXT, "--train", "norms", "--tokens", "512", "--batch-size", "4")
    assert layershare(*heal, "--set", "text.held_out=4")[0] == 0
    for folder in ("out", "healed"):
        assert api.verify(folder).files > 4
        flip(here / folder / "tokenizer.json", 10)
    code, _, err = layershare(*heal, "--set", "text.held_out=4")
    assert (code, "'tokenizer.json' has changed; delete the folder" in err) == (2, True)
    code, _, err = layershare("heal", "small", "-o", "other", *TEXT, "--loss", "distill", "--teacher", "out")
    assert (code, "out' is not as it was written: 'tokenizer.json' has changed" in err) == (2, True), err


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_without_a_manifest_a_tensor_that_is_no_number_is_named(small, tokenizer, words, value, tmp_path):
    (small / MANIFEST).unlink()
    tensors = load_file(small / "model.safetensors")
    tensors[TENSOR][0, 0] = value
    save_file(tensors, small / "model.safetensors", {"format": "pt"})
    named = f"The weights of '{TENSOR}' contain NaN or infinity"
    with pytest.raises(LayershareError, match=named):
        api.measure(api.load(small), tokenizer, text=words, length=64, blocks=1)
    with pytest.raises(LayershareError, match=named):
        api.measure(tiny_model("llama"), tokenizer, text=words, length=64, blocks=1, original=api.load(small))


def test_logits_that_overflow_are_no_perplexity(tokenizer, words):
    model = tiny_model("llama", dtype=torch.float16)
    with torch.no_grad():
        model.lm_head.weight.fill_(6e4)
    with pytest.raises(LayershareError, match="The logits overflow in float16; use a wider dtype"):
        api.measure(model, tokenizer, text=words, length=64, blocks=1)
