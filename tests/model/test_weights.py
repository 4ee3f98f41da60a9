import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershare.errors import LayershareError, UnsupportedModelError
from layershare.model.weights import Weights, find_blocks, require_finite
from tests.families import CONFIGS, tiny_model

torch.set_num_threads(1)


def saved(model: PreTrainedModel, folder: Path, **options) -> Path:
    model.save_pretrained(folder / "model", **options)
    return folder / "model"


def embedding(model: PreTrainedModel) -> Tensor:
    return next(model.get_input_embeddings().parameters())


def assert_equal(opened: Weights, model: PreTrainedModel) -> None:
    expected = Weights.of(model)
    assert opened.names() == expected.names()
    for name in expected.names():
        assert torch.equal(opened.tensor(name), expected.tensor(name)), name


@pytest.mark.parametrize("family", CONFIGS)
def test_opened_weights_are_those_of_the_model_and_nothing_is_resident(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    opened = Weights.open(saved(model, tmp_path), tmp_path / "scratch")
    assert_equal(opened, model)
    assert all(parameter.is_meta for parameter in opened.model.parameters())
    assert opened.fingerprint == Weights.of(model).fingerprint
    assert opened.blocks_name == Weights.of(model).blocks_name
    for index, dense in enumerate(Weights.of(model).blocks):
        with opened.block(index) as block:
            state = block.state_dict()
            assert all(torch.equal(state[name], tensor) for name, tensor in dense.state_dict().items())
        assert all(parameter.is_meta for parameter in block.parameters())
    assert all(parameter.is_meta for parameter in opened.model.parameters())


def test_no_hook_of_accelerate_is_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    opened = Weights.open(saved(tiny_model("llama"), tmp_path), tmp_path / "scratch")
    for module in opened.model.modules():
        assert not vars(module).keys() & {"_hf_hook", "_old_forward", "forward", "to", "cuda", "hf_device_map"}
    assert "meta device" not in capfd.readouterr().err


def test_blocks_in_memory_are_the_models_own() -> None:
    model = tiny_model("llama")
    weights = Weights.of(model)
    with weights.block(2) as block:
        assert block is weights.blocks[2]
    assert next(block.parameters()).device.type == "cpu"


def test_changes_to_a_block_from_disk_vanish(tmp_path: Path) -> None:
    opened = Weights.open(saved(tiny_model("llama"), tmp_path), tmp_path / "scratch")
    with opened.block(0) as block:
        next(block.parameters()).data.zero_()
        block.set_submodule("mlp.up_proj", nn.Identity())
    with opened.block(0) as block:
        assert next(block.parameters()).count_nonzero()
        assert isinstance(block.get_submodule("mlp.up_proj"), nn.Linear)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shell_holds_what_is_outside_of_the_blocks(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    opened = Weights.open(saved(model, tmp_path), tmp_path / "scratch")
    shell = opened.shell()
    blocks = shell.get_submodule(opened.blocks_name)
    assert all(parameter.is_meta for parameter in blocks.parameters())
    assert torch.equal(embedding(shell), embedding(model))
    assert embedding(opened.model).is_meta
    assert shell.get_parameter("lm_head.weight").is_meta


def test_shell_shares_the_tensors_of_a_model_in_memory() -> None:
    model = tiny_model("llama").train()
    shell = Weights.of(model).shell()
    assert not shell.training
    assert model.training
    assert all(a is b for a, b in zip(shell.parameters(), model.parameters(), strict=True))
    assert not set(shell.modules()) & set(model.modules())


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_tied_embeddings_come_once(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    opened = Weights.open(saved(model, tmp_path), tmp_path / "scratch")
    assert "lm_head.weight" not in opened.names()
    assert torch.equal(opened.tensor("lm_head.weight"), embedding(model))


def test_sharded_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = saved(model, tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_equal(Weights.open(folder, tmp_path / "scratch"), model)


def test_pytorch_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    folder = saved(model, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    opened = Weights.open(folder, tmp_path / "scratch")
    assert_equal(opened, model)
    assert opened.fingerprint == Weights.of(model).fingerprint


def test_checkpoint_without_the_base_models_prefix(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    folder = saved(model, tmp_path)
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    assert "h.0.attn.c_attn.weight" in tensors
    save_file(tensors, file, metadata={"format": "pt"})
    assert_equal(Weights.open(folder, tmp_path / "scratch"), model)


def test_another_dtype(tmp_path: Path) -> None:
    model = tiny_model("llama")
    opened = Weights.open(saved(model, tmp_path), tmp_path / "scratch", dtype=torch.bfloat16)
    assert_equal(opened, tiny_model("llama").bfloat16())


def test_fingerprint_changes_with_a_tensor_and_with_the_architecture(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = Weights.of(model).fingerprint
    model.get_parameter("model.layers.2.mlp.up_proj.weight").data.mul_(1.01)
    after = Weights.of(model).fingerprint
    assert before != after
    folder = saved(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    assert Weights.open(folder, tmp_path / "scratch").fingerprint != after


def test_missing_weights_are_named(tmp_path: Path) -> None:
    folder = saved(tiny_model("llama"), tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LayershareError, match=r"lacks 1 .* 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        Weights.open(folder, tmp_path / "scratch")


def test_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(LayershareError, match=r"is not a model: it has no config\.json"):
        Weights.open(tmp_path, tmp_path / "scratch")
    folder = saved(tiny_model("llama"), tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(LayershareError, match=r"The weight file 'model.safetensors' .* cannot be used"):
        Weights.open(folder, tmp_path / "scratch")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    weights = Weights.of(tiny_model("llama", dtype=torch.bfloat16))
    weights.model.get_parameter("model.layers.3.mlp.up_proj.weight").data[5, 7] = value
    with weights.block(2) as block:
        require_finite(block.named_parameters(weights.block_name(2)))
    with (
        weights.block(3) as block,
        pytest.raises(LayershareError, match=r"The weights of 'model\.layers\.3\.mlp\.up_proj\.weight' contain NaN"),
    ):
        require_finite(block.named_parameters(weights.block_name(3)))


def test_blocks_are_the_longest_outermost_list() -> None:
    model = tiny_model("opt")
    name, blocks = find_blocks(model)
    assert (name, len(blocks)) == ("decoder.layers", 4)
    blocks[0].experts = nn.ModuleList(nn.Identity() for _ in range(9))
    assert find_blocks(model)[0] == "decoder.layers"
    model.base_model.set_submodule("decoder.layers", nn.Identity())
    with pytest.raises(UnsupportedModelError):
        find_blocks(model)
