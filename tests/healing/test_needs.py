"""What a healing says that it will need."""

from layershare.healing.needs import estimate
from tests.families import tiny_model
from tests.healing.tiny import job, settings


def test_what_is_held_is_counted_by_number(small):
    model = tiny_model("llama")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    wide = estimate(model, settings(small), 8, 4, 16, 100, False)
    assert (wide.parameters, wide.trained, wide.tokens) == (parameters, parameters, 8 * 4 * 16)
    assert (wide.weights, wide.gradients, wide.states) == (4 * parameters, 4 * parameters, 8 * parameters)
    narrow = estimate(model, settings(small, precision="bfloat16"), 8, 4, 16, 100, False)
    assert narrow.weights == 6 * parameters
    assert narrow.activations < wide.activations


def test_gradients_that_wait_stand_beside_the_activations(small):
    whole, split = (job(small, train="full", micro_batch=rows) for rows in (4, 2))
    at_once, waiting = whole.needs(whole.student()), split.needs(split.student())
    assert at_once.activations == 2 * waiting.activations
    assert at_once.memory == at_once.weights + at_once.states + max(at_once.gradients, at_once.activations)
    assert waiting.memory == waiting.weights + waiting.states + waiting.gradients + waiting.activations


def test_frozen_weights_keep_less(small):
    model = tiny_model("llama")
    full = estimate(model, settings(small), 8, 4, 16, 0, False).activations
    model.requires_grad_(False)
    norms = model.model.layers[0].input_layernorm.requires_grad_(True)
    first = estimate(model, settings(small), 8, 4, 16, 0, False).activations
    norms.requires_grad_(False)
    model.model.layers[-1].input_layernorm.requires_grad_(True)
    last = estimate(model, settings(small), 8, 4, 16, 0, False).activations
    assert last < first < full
