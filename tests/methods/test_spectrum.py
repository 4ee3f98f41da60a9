import pytest
import torch

from layershare.methods.low_rank import SPECTRUM_POINTS, sampled


def test_a_long_spectrum_is_sampled_from_its_first_to_its_last_component_and_at_the_cut():
    spectrum = torch.linspace(0, 1, 5000, dtype=torch.float64).flip(0)
    kept = sampled(spectrum, 1234)
    assert len(kept["index"]) == len(kept["share"]) <= SPECTRUM_POINTS + 1
    assert kept["index"][:3] == [1, 2, 3]
    assert kept["index"][-1] == 5000
    assert 1234 in kept["index"]
    assert kept["share"] == pytest.approx([float(spectrum[i - 1] / spectrum.sum()) for i in kept["index"]], rel=1e-3)


def test_a_short_spectrum_is_whole_and_one_of_zeros_does_no_harm():
    assert sampled(torch.tensor([3.0, 1.0]), 1) == {"index": [1, 2], "share": [0.75, 0.25]}
    assert sampled(torch.zeros(3), 2)["share"] == [0, 0, 0]
