from pathlib import Path
from threading import active_count
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from layershare.calibrate.drivers.batches import Batches
from layershare.calibrate.drivers.calls import hidden_output
from layershare.calibrate.drivers.replay import record
from layershare.calibrate.stream import Stream
from layershare.errors import LayershareError, UnsupportedModelError
from layershare.model.weights import Weights
from tests.families import CONFIGS, LAYERS, WIDTH, tiny_model, tokens

torch.set_num_threads(1)

TEXT = tokens(5, 40)  # longer than the sliding windows; the third batch of 2 is a smaller one


def real_outputs(model: PreTrainedModel, text: Tensor = TEXT, batch_size: int = 2) -> list[Tensor]:
    """What each block returns in the model's own forward: hidden states [n, length, width]."""
    blocks = Weights.of(model).blocks
    seen: list[list[Tensor]] = [[] for _ in blocks]

    def watch(index: int):
        return lambda _module, _args, output: seen[index].append(hidden_output(output))

    handles = [block.register_forward_hook(watch(i)) for i, block in enumerate(blocks)]
    with torch.no_grad():
        for batch in text.split(batch_size):
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(outputs) for outputs in seen]


def streamed_outputs(stream: Stream) -> list[Tensor]:
    outputs = []
    for _, _ in stream:
        stream.run()
        outputs.append(stream.outputs)
    return outputs


def assert_exact(streamed: list[Tensor], real: list[Tensor]) -> None:
    assert len(streamed) == len(real)
    for i, (a, b) in enumerate(zip(streamed, real, strict=True)):
        assert torch.equal(a, b), f"block {i}"


def opened(model: PreTrainedModel, folder: Path) -> Weights:
    model.save_pretrained(folder / "model")
    return Weights.open(folder / "model", folder / "scratch")


@pytest.mark.parametrize("family", CONFIGS)
def test_replay_and_lock_step_are_exact_in_memory_and_from_disk(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    real = real_outputs(model)
    for weights in (Weights.of(model), opened(model, tmp_path)):
        replay = Stream(weights, TEXT, batch_size=2)
        assert_exact(streamed_outputs(replay), real)
        assert not replay.lock_step
        assert_exact(streamed_outputs(Stream(weights, TEXT, batch_size=2, lock_step=True)), real)
        assert all(parameter.is_meta for parameter in weights.model.parameters()) == (weights.model is not model)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj", "bloom"])
def test_replay_is_exact_with_eager_attention(family: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    stream = Stream(Weights.of(model), TEXT, batch_size=2)
    assert_exact(streamed_outputs(stream), real_outputs(model))
    assert not stream.lock_step


def test_masks_and_tables_are_recorded_once() -> None:
    """Batches and blocks share one copy; a smaller last batch and the two kinds of mask need their own."""
    model = tiny_model("gemma2")
    model.set_attn_implementation("eager")
    stored = {}

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            stored[value.data_ptr()] = value
        elif isinstance(value, (tuple, list)):
            for item in value:
                collect(item)
        elif isinstance(value, dict):
            collect(tuple(value.values()))

    replay = record(Weights.of(model), Batches(tokens(9, 40), 2, None))
    assert replay is not None
    collect(replay._calls)
    masks = [tensor.shape for tensor in stored.values() if tensor.dim() == 4]
    assert sorted(masks) == [(1, 1, 40, 40)] * 2 + [(2, 1, 40, 40)] * 2
    assert len(stored) <= 4 + 2 * 3


class ToyConfig(PreTrainedConfig):
    model_type = "toy"
    attribute_map: ClassVar[dict[str, str]] = {}

    def __init__(self, kind: str = "plain", **kwargs: Any) -> None:
        self.kind = kind
        self.hidden_size = WIDTH
        super().__init__(**kwargs)


class ToyBlock(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.5)

    def forward(self, hidden_states: Tensor, scale: Any = None, memory: Any = None) -> Any:
        output = hidden_states + self.dropout(self.mix(hidden_states)).tanh()
        if memory is not None:
            memory.append(output.mean())
            output = output + sum(memory)
        if scale is not None:
            output = output * scale
        return (output, output.std()) if self.kind == "extra" else output


class Toy(PreTrainedModel):
    """Blocks in which something besides the hidden states flows from block to block, as `kind` says."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.kind = config.kind
        self.embed = nn.Embedding(160, WIDTH)
        self.layers = nn.ModuleList(ToyBlock(config.kind) for _ in range(LAYERS))
        self.post_init()

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
        del use_cache
        states = self.embed(input_ids)
        early = scale = None
        memory: list[Tensor] | None = [] if self.kind == "memory" else None
        layers = list(self.layers)
        if self.kind == "backwards":
            layers.reverse()
        for i, layer in enumerate(layers[:2] if self.kind == "short" else layers):
            if self.kind == "skip" and i == 3:
                states = states + early
            if self.kind == "in place" and i == 2:
                states.mul_(0.5)
            if self.kind == "argument" and early is not None:
                scale = early.abs().mean()
            output = layer(hidden_states=states, scale=scale, memory=memory)
            if self.kind == "extra":
                states, scale = output
            else:
                states = output
            early = states if i == 0 else early
        return states


def toy(kind: str) -> Toy:
    torch.manual_seed(0)
    return Toy(ToyConfig(kind)).eval()


@pytest.mark.parametrize("kind", ["plain", "argument", "extra", "skip", "in place", "memory"])
def test_lock_step_where_more_than_the_hidden_states_flows(kind: str) -> None:
    model = toy(kind)
    stream = Stream(Weights.of(model), TEXT, batch_size=2)
    streamed = streamed_outputs(stream)
    assert stream.lock_step == (kind != "plain")
    if kind == "in place":  # a hook keeps the tensor that is changed afterwards
        assert torch.equal(streamed[-1], real_outputs(model)[-1])
    else:
        assert_exact(streamed, real_outputs(model))


@pytest.mark.parametrize("kind", ["backwards", "short"])
@pytest.mark.parametrize("lock_step", [False, True])
def test_blocks_out_of_order_are_refused(kind: str, lock_step: bool) -> None:
    threads = active_count()
    with pytest.raises(UnsupportedModelError, match="once each and in order"):
        streamed_outputs(Stream(Weights.of(toy(kind)), TEXT, 2, lock_step=lock_step))
    assert active_count() == threads


def keeper(inputs: list[Tensor]):
    return lambda _module, args: inputs.append(args[0])


@pytest.mark.parametrize("lock_step", [False, True])
def test_hooks_see_the_inputs_on_every_run_and_the_last_run_counts(lock_step: bool) -> None:
    model = tiny_model("llama")
    real = real_outputs(model)
    weights = Weights.of(model)
    stream = Stream(weights, TEXT, batch_size=2, lock_step=lock_step)
    for i, block in stream:
        inputs: list[Tensor] = []
        handle = block.register_forward_pre_hook(keeper(inputs))
        up = block.get_submodule("mlp.up_proj")
        block.set_submodule("mlp.up_proj", nn.Linear(WIDTH, 56, bias=False))
        stream.run()
        assert not torch.equal(stream.outputs, real[i])
        block.set_submodule("mlp.up_proj", up)
        stream.run()
        handle.remove()
        assert torch.equal(stream.outputs, real[i])
        first, second = torch.cat(inputs[:3]), torch.cat(inputs[3:])
        assert torch.equal(first, second)
        assert i == 0 or torch.equal(first, real[i - 1])


@pytest.mark.parametrize("lock_step", [False, True])
def test_a_changed_block_changes_the_next_ones_inputs(lock_step: bool, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    stream = Stream(opened(model, tmp_path), TEXT, batch_size=2, lock_step=lock_step)
    for i, block in stream:
        if i == 1:
            block.get_parameter("mlp.c_proj.weight").data.zero_()
    model.get_parameter("transformer.h.1.mlp.c_proj.weight").data.zero_()
    assert torch.equal(stream.outputs, real_outputs(model)[-1])


def spoil(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    kwargs["hidden_states"].add_(1)


def test_a_block_that_spoils_its_input_may_be_run_again() -> None:
    stream = Stream(Weights.of(toy("plain")), TEXT, batch_size=2)
    for _, block in stream:
        handle = block.register_forward_pre_hook(spoil, with_kwargs=True)
        stream.run()
        first = stream.outputs.clone()
        stream.run()
        handle.remove()
        assert torch.equal(stream.outputs, first)


def test_the_body_may_call_the_block_with_gradients() -> None:
    stream = Stream(Weights.of(tiny_model("llama")), TEXT, batch_size=2)
    for i, block in stream:
        args, kwargs = stream.call(2)
        output = hidden_output(block(*args, **kwargs))
        output.sum().backward()
        assert block.get_parameter("mlp.up_proj.weight").grad is not None
        stream.run()
        assert torch.equal(output, stream.outputs[4:]), f"block {i}"


def test_the_iterator_runs_what_the_body_did_not() -> None:
    model = tiny_model("llama")
    stream = Stream(Weights.of(model), TEXT, batch_size=2)
    for _, _ in stream:
        pass
    assert torch.equal(stream.outputs, real_outputs(model)[-1])


@pytest.mark.parametrize("lock_step", [False, True])
def test_repeating_gives_the_same_bits_also_after_a_break(lock_step: bool, tmp_path: Path) -> None:
    weights = opened(tiny_model("gemma3_text", dtype=torch.bfloat16), tmp_path)
    threads = active_count()
    stream = Stream(weights, TEXT, batch_size=2, lock_step=lock_step)
    for i, _ in stream:
        if i == 2:
            break
    assert active_count() == threads
    first = streamed_outputs(stream)
    assert_exact(streamed_outputs(Stream(weights, TEXT, batch_size=2, lock_step=lock_step)), first)


@pytest.mark.parametrize("lock_step", [False, True])
def test_a_model_in_memory_is_left_as_it_was(lock_step: bool) -> None:
    model = toy("plain").train()
    model.layers[1].eval()
    state = torch.get_rng_state()
    training = [module.training for module in model.modules()]
    keys = [vars(module).keys() for module in model.modules()]
    parameters = list(model.parameters())
    streamed = streamed_outputs(Stream(Weights.of(model), TEXT, batch_size=2, lock_step=lock_step))
    assert [module.training for module in model.modules()] == training
    assert [vars(module).keys() for module in model.modules()] == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert_exact(streamed, real_outputs(model.eval()))


@pytest.mark.parametrize("lock_step", [False, True])
def test_hidden_states_in_files(lock_step: bool, tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    stream = Stream(Weights.of(model), TEXT, 2, scratch=tmp_path, lock_step=lock_step)
    assert_exact(streamed_outputs(stream), real_outputs(model))
    assert not list(tmp_path.iterdir())


def test_scratch_folder_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    with pytest.raises(LayershareError, match="of disk in"):
        streamed_outputs(Stream(Weights.of(tiny_model("llama")), TEXT, 2, scratch=tmp_path))


def test_run_outside_of_the_loop() -> None:
    stream = Stream(Weights.of(tiny_model("llama")), TEXT, 2)
    with pytest.raises(RuntimeError, match="inside a loop"):
        stream.run()
    with pytest.raises(RuntimeError, match="not been run"):
        _ = stream.outputs


@pytest.mark.parametrize("first", [0, 3, 4, 7, 10])
def test_batches_split_into_the_first_rows_and_the_others(first):
    text = tokens(10, 8)
    batches = Batches(text, 4, None)
    front, rest = ([batches.rows(text, batch)[rows] for batch, rows in parts] for parts in batches.split(first))
    assert torch.equal(torch.cat([text[:0], *front]), text[:first])
    assert torch.equal(torch.cat([text[:0], *rest]), text[first:])
    assert all(len(part) for part in [*front, *rest])
