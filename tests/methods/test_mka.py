import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from layershare.calibrate.stats import calibrate
from layershare.calibrate.text import load_text
from layershare.errors import LayershareError
from layershare.methods.mka import cells_of, diffusion_map, similarity
from layershare.plan.edits import Merge
from tests.families import tiny_model
from tests.methods.known import deep_llama, edits_of, keep_without


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_diffusion_map_is_the_one_that_the_paper_s_formulas_give():
    states = random(20, 7)
    x = states.numpy()
    distances = np.array([[math.dist(a, b) for b in x] for a in x])
    sigma = torch.tensor(distances[~np.eye(20, dtype=bool)]).median().item()
    kernel = np.exp(-((distances / sigma) ** 0.5))
    p = kernel.sum(0)
    kernel = kernel / np.outer(p, p) ** 0.5
    v = np.sqrt(kernel.sum(0))
    u, _, _ = np.linalg.svd(kernel / np.outer(v, v))
    expected = torch.tensor(u[:, 1:3] / u[:, :1])
    found = diffusion_map(states) * float(np.linalg.norm(v))  # the trivial eigenvector v, at norm 1
    signs = (found * expected).sum(0).sign()  # no eigenvector has one of its own
    torch.testing.assert_close(found * signs, expected, rtol=1e-6, atol=1e-8)


def test_the_map_does_not_depend_on_scale_nor_fail_on_equal_states():
    states = random(18, 5)
    assert torch.equal(cells_of(diffusion_map(states)), cells_of(diffusion_map(1024 * states)))
    assert diffusion_map(torch.ones(16, 5)).isfinite().all()


def test_cells_are_equally_filled():
    cells = cells_of(random(81, 2))
    assert cells.min() == 0
    assert cells.max() == 8
    first = cells % 3
    assert torch.bincount(first).tolist() == [27, 27, 27]


def test_similarity_is_normalised_mutual_information():
    one, two = (torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    two = torch.where(torch.arange(200) < 120, one, two)
    information = 0.0
    entropy = [0.0, 0.0]
    for a in range(4):
        for b in range(4):
            p = ((one == a) & (two == b)).double().mean().item()
            pa, pb = (one == a).double().mean().item(), (two == b).double().mean().item()
            information += p * math.log(p / (pa * pb)) if p else 0.0
    for i, cells in enumerate((one, two)):
        entropy[i] = -sum(p * math.log(p) for p in (torch.bincount(cells) / 200).double().tolist())
    assert similarity(one, two) == pytest.approx(information / math.sqrt(entropy[0] * entropy[1]), rel=1e-6)


def test_similarity_is_one_for_the_same_cells_and_nought_for_independent_ones():
    cells = torch.arange(64) % 4
    assert similarity(cells, cells) == 1
    assert similarity(cells, (cells + 1) % 4) == 1  # the cells' names do not matter
    assert similarity(cells, torch.arange(64) // 16) == pytest.approx(0, abs=1e-12)


def test_the_most_similar_neighbours_merge_in_proportion_to_their_similarity(evidence):
    model = deep_llama()
    measured = evidence(model)
    cells = [cells_of(diffusion_map(measured.stats.pooled(layer))) for layer in range(6)]
    s = [similarity(cells[layer], cells[layer + 1]) for layer in range(5)]
    best = max(range(5), key=lambda layer: (s[layer], layer))
    edits = edits_of(measured, "mka", keep_without(model, "block", 0))
    assert edits == (Merge(best, (best, best + 1), (s[best], 1 - s[best])),)


def test_merged_layers_merge_on_until_the_budget_is_met(evidence):
    model = deep_llama()
    edits = edits_of(evidence(model), "mka", keep_without(model, "block", *range(5)))
    (merge,) = edits
    assert isinstance(merge, Merge)
    assert merge.layers == (0, 1, 2, 3, 4, 5)
    assert sum(merge.coefficients) == pytest.approx(1)
    assert all(0 <= coefficient <= 1 for coefficient in merge.coefficients)


def test_too_few_blocks_are_refused(evidence, tokenizer, words, tmp_path):
    measured = evidence(tiny_model("llama"))
    text = load_text(words, tokenizer, split="train", blocks=8, length=32)
    stats = calibrate(measured.weights, measured.spec, text, tmp_path / "few", batch_size=8, kinds={"blocks"})
    with pytest.raises(LayershareError, match="at least 16 blocks"):
        edits_of(replace(measured, measured=stats), "mka", 0.8)
