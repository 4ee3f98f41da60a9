"""The refit that follows the original: its closed form, what it chooses on held-out text, and what it gains."""

import json
from typing import Any

import pytest
import torch

import layershare
from layershare.calibrate.text import load_text
from layershare.errors import LayershareError
from layershare.formulas.linalg import ridge_fits
from layershare.model.hub import load
from layershare.solve.two_streams import RIDGES, Moments, _Fit
from tests.families import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(small: torch.Tensor, dense: torch.Tensor) -> Moments:
    made = Moments.zeros(small.shape[1], small.device)
    made.add(small, dense)
    return made


def test_coefficients_are_those_of_least_squares_with_a_ridge_towards_what_is_there():
    basis, weight, present = drawn(8, 3, seed=0), drawn(8, 5, seed=1), drawn(3, 5, seed=2)
    dense = drawn(40, 8, seed=3)
    small = dense + 0.3 * drawn(40, 8, seed=4)
    read = small @ basis
    normal, target = read.T @ read, read.T @ dense @ weight
    scale = float(normal.diagonal().mean())
    for ridge, fit in zip(RIDGES, ridge_fits(normal, target, present, RIDGES), strict=True):
        pull = (ridge * scale) ** 0.5
        rows = torch.cat([read, pull * torch.eye(3, dtype=torch.float64)])
        expected = torch.linalg.lstsq(rows, torch.cat([dense @ weight, pull * present])).solution
        torch.testing.assert_close(fit, expected)


def test_the_ridge_is_chosen_on_the_held_out_text_and_what_is_there_may_stay():
    basis, weight = drawn(8, 3, seed=0), drawn(8, 5, seed=1)
    dense = drawn(400, 8, seed=2)
    small = dense @ (torch.eye(8, dtype=torch.float64) + 0.2 * drawn(8, 8, seed=3))
    train, test = moments(small[:300], dense[:300]), moments(small[300:], dense[300:])
    best = torch.linalg.lstsq(small[300:] @ basis, dense[300:] @ weight).solution
    assert _Fit(weight, train, test, None).best(basis, best, []) is None
    start = drawn(3, 5, seed=4)
    found = _Fit(weight, train, test, None).best(basis, start, [])
    assert found is not None

    def error(coef: torch.Tensor) -> float:
        return float((small[300:] @ basis @ coef - dense[300:] @ weight).norm())

    candidates = ridge_fits(*_normal(basis, weight, train), start, RIDGES)
    assert error(found) == pytest.approx(min(error(each) for each in candidates), rel=1e-4)
    # From text that is nothing like the held-out one nothing is taken that makes it worse.
    strange = moments(drawn(300, 8, seed=5), drawn(300, 8, seed=6))
    close = best + 0.01 * drawn(3, 5, seed=7)
    chosen = _Fit(weight, strange, test, None).best(basis, close, [])
    assert chosen is None or error(chosen) <= error(close)


def _normal(basis: torch.Tensor, weight: torch.Tensor, of: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    return basis.T @ of.gram.double() @ basis, basis.T @ of.cross.double() @ weight


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon"])
def test_a_model_comes_closer_to_its_original(family, tmp_path, tokenizer, words):
    model = tiny_model(family)
    lost = {}
    given = load_text(words, tokenizer, split="train", blocks=100, length=32).tokens[80:]  # neither fitted nor held out
    common: Any = {"method": "auto", "keep": 0.5, "of": "targets", "text": words, "blocks": 60, "length": 32}
    for refit in (False, "auto"):
        folder = tmp_path / str(refit)
        small = layershare.compress(model, tokenizer, **common, refit=refit, folder=folder)
        with torch.no_grad():
            lost[refit] = float((small(given).logits - model(given).logits).norm())
            assert torch.equal(load(folder)(given).logits, small(given).logits)
        results = json.loads((folder / "results.json").read_text())
        assert results["refit"] == (refit == "auto")
        assert sum(p.numel() for p in small.parameters()) == results["after"]["all"]["parameters"]
    assert lost["auto"] < lost[False]


def test_matrices_that_stayed_dense_are_fitted_too(tmp_path, tokenizer, words):
    model = tiny_model("llama")
    plan = json.loads(layershare.make_plan(model, method="svd", keep=0.5, of="targets").to_json())
    plan |= {"method": "auto", "options": {}}
    plan["edits"] = [edit for edit in plan["edits"] if edit["places"][0][1] < 2]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    small = layershare.compress(
        model, tokenizer, method="auto", plan=tmp_path / "plan.json", text=words, blocks=60, length=32, refit=True
    )
    before, after = model.state_dict(), small.state_dict()
    dense = [name for name in before if name in after and "_proj" in name]
    assert any(not torch.equal(before[name], after[name]) for name in dense)
    assert all(torch.equal(before[name], tiny_model("llama").state_dict()[name]) for name in before)


def test_deltas_and_parts_that_were_dropped_are_passed_over(tmp_path, tokenizer, words):
    model = tiny_model("llama")
    plan = json.loads(layershare.make_plan(model, method="svd", keep=0.5, of="targets").to_json())
    plan |= {"method": "auto", "options": {}}
    plan["edits"] = [
        {"places": [["q", 0], ["k", 0]], "rank": 8, "side": "input", "pivot": True},
        {"part": "attention", "layers": [1]},
        {"part": "mlp", "layers": [2]},
    ]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    common: Any = {"method": "auto", "plan": tmp_path / "plan.json", "text": words, "blocks": 60, "length": 32}
    small = layershare.compress(model, tokenizer, **common, refit=True)
    plain = layershare.compress(model, tokenizer, **common, refit=False)
    assert plain.state_dict().keys() == small.state_dict().keys()
    basis = "model.layers.0.self_attn.q_proj.basis.weight"
    assert torch.equal(plain.state_dict()[basis], small.state_dict()[basis])
    changed = {name for name, value in small.state_dict().items() if not torch.equal(value, plain.state_dict()[name])}
    assert changed
    assert all(name.endswith(("coef.weight", "_proj.weight")) for name in changed)


@pytest.mark.filterwarnings("ignore:The text 'strings' has 1 blocks")
def test_text_of_one_block_cannot_be_held_out(tokenizer):
    with pytest.raises(LayershareError, match="one block"):
        layershare.compress(tiny_model("llama"), tokenizer, method="auto", text=["a" * 40], blocks=4, length=32)
