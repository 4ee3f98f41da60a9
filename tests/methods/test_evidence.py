"""What methods are given, on the device that they compute on."""

import torch

from layershare.methods.evidence import Evidence
from layershare.model.arch import describe
from layershare.model.weights import Weights
from tests.families import tiny_model
from tests.methods.evidence import measured


def test_weights_from_disk_and_statistics_meet_on_the_device_that_was_asked_for(tmp_path, tokenizer, words):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    stats = measured(model, tmp_path / "stats", tokenizer, words, "inputs", "fisher").stats
    # No machine is without this device.
    weights = Weights.open(tmp_path / "model", tmp_path / "scratch", device="meta")
    spec = describe(model)
    evidence, linear = Evidence(spec, weights, stats), spec.linears[0]
    inputs = evidence.inputs(linear)
    assert inputs is not None
    given = (evidence.weight(linear), inputs.gram, inputs.magnitude, inputs.fisher)
    assert {tensor.device for tensor in given} == {torch.device("meta")}
