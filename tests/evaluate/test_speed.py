from functools import partial
from typing import Any

import pytest
import torch

from layershare.errors import LayershareError
from layershare.evaluate.speed import Rate, Workload, generate_seconds, measure_speed, weight_bytes
from tests.families import tiny_model


def measured(*models: Any, progress: Any = lambda *_: None, **work: Any) -> list[Rate]:
    timers = [partial(generate_seconds, model) for model in models]
    return measure_speed(timers, Workload(**work), models[0].config.vocab_size, progress)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_both_phases_are_measured_at_every_batch(family):
    seen = []
    model = tiny_model(family).train()
    rates = measured(
        model,
        tiny_model(family),
        batches=(1, 3),
        prompt=6,
        new=3,
        rounds=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [(rate.phase, rate.batch) for rate in rates] == [
        ("prefill", 1),
        ("decode", 1),
        ("prefill", 3),
        ("decode", 3),
    ]
    assert all(rate.model > 0 and (rate.original or 0) > 0 and (rate.ratio or 0) > 0 for rate in rates)
    assert all(rate.latency > 0 and (rate.original_latency or 0) > 0 for rate in rates)
    assert seen == [(done, 6) for done in range(7)]
    assert model.training


def test_the_work_is_what_it_says():
    calls = []
    model = tiny_model("llama")
    model.model.layers[0].register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[:2]))
    (prefill, decode) = measured(model, batches=(2,), prompt=6, new=4, rounds=3)
    assert (prefill.original, decode.ratio) == (None, None)
    assert prefill.model * prefill.latency == pytest.approx(2 * 6)
    assert decode.model * decode.latency == pytest.approx(2)
    one_round = [(2, 6), (2, 1), (2, 1), (2, 1)]
    assert calls == one_round * 4  # one of them warms up


def test_settings_of_generation_do_not_change_the_work():
    calls, model = [], tiny_model("llama")
    for name, value in {"num_beams": 3, "stop_strings": ["x"], "max_time": 1e-6}.items():
        setattr(model.generation_config, name, value)
    model.model.layers[0].register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[:2]))
    generate_seconds(model, torch.ones(2, 6, dtype=torch.long), 3)
    assert calls == [(2, 6), (2, 1), (2, 1)]


def test_an_end_token_does_not_end_the_measurement():
    model = tiny_model("llama")
    model.lm_head.weight.data[model.config.eos_token_id] = 100 * model.lm_head.weight.abs().max()
    assert len(measured(model, batches=(1,), prompt=4, new=5, rounds=1)) == 2


@pytest.mark.parametrize("options", [{"prompt": 0}, {"new": 1}, {"rounds": 0}])
def test_what_cannot_be_measured_is_said(options):
    with pytest.raises(LayershareError, match="a prompt, two new tokens and one round"):
        Workload(**options)


def test_what_is_shared_is_in_memory_once():
    model = tiny_model("llama")
    before, mlp = weight_bytes(model), model.model.layers[1].mlp
    assert before == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    model.model.layers[1].mlp = model.model.layers[0].mlp
    assert weight_bytes(model) == before - sum(parameter.nbytes for parameter in mlp.parameters())
