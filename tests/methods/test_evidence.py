"""What methods are given, on the device that they compute on."""

import pytest
import torch

from layershare.errors import LayershareError
from layershare.model.describe import describe
from layershare.model.weights import Weights
from layershare.plan.evidence import Evidence
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
    given = [read(linear) for read in (evidence.weight, evidence.gram, evidence.magnitude, evidence.fisher)]
    assert {tensor.device for tensor in given} == {torch.device("meta")}


def test_what_is_not_there_is_refused():
    evidence = Evidence(describe(tiny_model("llama")))
    with pytest.raises(LayershareError, match="by the weights"):
        _ = evidence.weights
    with pytest.raises(LayershareError, match="measured statistics"):
        evidence.gram(evidence.spec.linears[0])
    with pytest.raises(LayershareError, match="on a text"):
        _ = evidence.text
