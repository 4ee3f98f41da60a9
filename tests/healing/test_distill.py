import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layershare.errors import LayershareError
from layershare.healing import distill
from layershare.healing.distill import StoredLogits, cross_entropy, hidden_distance, kl_divergence, top_k_divergence
from layershare.model.weights import Weights
from tests.families import CONFIGS, VOCAB, tiny_model, tokens

SHAPE = (2, 5, 7)


@pytest.fixture(params=[2, 512])
def _positions(request, monkeypatch):
    """Positions that are worked on at once: fewer and more than there are."""
    monkeypatch.setattr(distill, "_POSITIONS", request.param)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    return ours.requires_grad_(), theirs


def softmax(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp(value / temperature) for value in logits]
    return [weight / sum(weights) for weight in weights]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.usefixtures("_positions")
def test_cross_entropy_by_hand(pair):
    logits, _ = pair
    labels = torch.tensor([[1, 2, 3, 4, 5], [6, 0, -100, 2, -100]])
    terms = [-math.log(softmax(logits[0, i].tolist(), 1)[int(labels[0, i + 1])]) for i in range(4)]
    terms += [-math.log(softmax(logits[1, i].tolist(), 1)[int(labels[1, i + 1])]) for i in (0, 2)]
    loss = cross_entropy(logits, labels)
    assert loss.item() == pytest.approx(sum(terms) / 6, rel=1e-12)
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad[:, -1].any()


@pytest.mark.usefixtures("_positions")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_by_hand(pair, temperature):
    ours, theirs = pair
    rows = zip(ours.flatten(0, 1).tolist(), theirs.flatten(0, 1).tolist(), strict=True)
    expected = [divergence(softmax(t, temperature), softmax(s, temperature)) for s, t in rows]
    loss = kl_divergence(ours, theirs, temperature)
    assert loss.item() == pytest.approx(temperature**2 * sum(expected) / len(expected), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, ours)
    change = (theirs / temperature).softmax(-1) - (ours / temperature).softmax(-1)
    torch.testing.assert_close(gradient, -change * temperature / 10)
    assert kl_divergence(theirs, theirs, temperature).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.usefixtures("_positions")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_of_the_top_k_by_hand(pair, temperature):
    ours, theirs = pair
    best = theirs.log_softmax(-1).topk(3)
    expected = []
    for s, t, ids in zip(ours.flatten(0, 1), theirs.flatten(0, 1), best.indices.flatten(0, 1).tolist(), strict=True):
        q, p = softmax(s.tolist(), 1), softmax(t.tolist(), 1)
        buckets = [[math.log(x[i]) for i in ids] + [math.log(1 - sum(x[i] for i in ids))] for x in (p, q)]
        expected.append(divergence(*(softmax(bucket, temperature) for bucket in buckets)))
    loss = top_k_divergence(ours, best.indices, best.values, temperature)
    assert loss.item() == pytest.approx(temperature**2 * sum(expected) / len(expected), rel=1e-10)
    assert temperature != 1 or loss < kl_divergence(ours, theirs)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_tokens_give_the_full_divergence(pair, temperature):
    ours, theirs = pair
    best = theirs.log_softmax(-1).topk(SHAPE[-1])
    losses = kl_divergence(ours, theirs, temperature), top_k_divergence(ours, best.indices, best.values, temperature)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, ours)[0] for loss in losses))


def test_a_teacher_that_is_sure_gives_finite_gradients():
    ours = torch.randn(1, 2, 7, requires_grad=True)
    sure = torch.tensor([[[0.0, -60.0]] * 2])
    loss = top_k_divergence(ours, torch.tensor([[[3, 1]] * 2]), sure)
    torch.testing.assert_close(loss, -ours.log_softmax(-1)[..., 3].mean())
    assert torch.autograd.grad(loss, ours)[0].isfinite().all()


def test_hidden_distance_by_hand():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.randn(2, 3, 4, generator=generator) for _ in range(2)] for _ in range(2))
    expected = [((s - t).norm() / t.norm()) ** 2 for s, t in zip(ours, theirs, strict=True)]
    torch.testing.assert_close(hidden_distance(ours, theirs), (expected[0] + expected[1]) / 2)


def test_losses_of_half_precision_logits_are_float32():
    ours = torch.randn(1, 3, 50, dtype=torch.bfloat16)
    for loss in (kl_divergence(ours, ours + 1), cross_entropy(ours, torch.ones(1, 3, dtype=torch.int64))):
        assert loss.dtype == torch.float32


def make(model, folder: Path, k: int = 4, batch_size: int = 2, **options) -> StoredLogits:
    return StoredLogits.make(Weights.of(model), tokens(5), folder, k, batch_size, unit=24, **options)


@pytest.mark.parametrize("family", CONFIGS)
def test_stored_logits_are_the_models(family, tmp_path):
    model = tiny_model(family)
    ids, logprobs = make(model, tmp_path).rows([4, 1])
    with torch.no_grad():
        best = model(tokens(5)[[4, 1]]).logits.log_softmax(-1).topk(4)
    torch.testing.assert_close(logprobs, best.values, rtol=1e-4, atol=1e-5)
    assert torch.equal(ids, best.indices)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # with a head of its own, and tied to the embedding
def test_a_teacher_on_disk_gives_the_same_logits(family, tmp_path):
    model = tiny_model(family, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    opened = Weights.open(tmp_path / "model", tmp_path / "scratch")
    expected = make(model, tmp_path / "memory", k=VOCAB + 1).rows(range(5))
    stored = StoredLogits.make(opened, tokens(5), tmp_path / "disk", VOCAB + 1, 2, unit=24).rows(range(5))
    assert stored[0].shape == (5, 12, VOCAB)
    assert all(map(torch.equal, stored, expected))


def test_what_is_there_is_not_computed_again(tmp_path):
    model = tiny_model("llama")
    whole = make(model, tmp_path / "whole").rows(range(5))

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(model, tmp_path / "stopped", progress=stop)
    first = tmp_path / "stopped" / "logits-00000.safetensors"
    before = first.stat().st_mtime_ns
    steps = []
    again = make(model, tmp_path / "stopped", progress=lambda done, total: steps.append(total))
    assert set(steps[:-1]) == {2 * 4}  # layers of two of the three files
    assert first.stat().st_mtime_ns == before
    assert all(map(torch.equal, again.rows(range(5)), whole))
    assert {path.name for path in (tmp_path / "stopped").iterdir()} >= {
        path.name for path in Path(tmp_path / "whole").iterdir()
    }

    first.write_bytes(first.read_bytes()[:-8] + bytes(8))
    make(model, tmp_path / "stopped", progress=lambda done, total: steps.append(total))
    assert steps[-2] == 4  # the damaged one
    assert load_file(first)["logprobs"].any()


def test_logits_of_another_teacher_or_purpose_are_made_anew(tmp_path):
    first = make(tiny_model("llama"), tmp_path).rows([0])
    steps = []
    again = make(tiny_model("llama", seed=1), tmp_path, progress=lambda done, total: steps.append(total))
    assert steps[0] == 3 * 4
    assert not torch.equal(again.rows([0])[1], first[1])
    others: tuple[dict[str, Any], ...] = ({"identity": {"note": 1}}, {"k": 5})
    for changes in others:
        steps.clear()
        make(tiny_model("llama", seed=1), tmp_path, progress=lambda done, total: steps.append(total), **changes)
        assert steps[0] == 3 * 4


def test_a_teacher_whose_logits_overflow_is_refused(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e41)
    with pytest.raises(LayershareError, match="logits overflow or contain NaN"):
        make(model, tmp_path)
