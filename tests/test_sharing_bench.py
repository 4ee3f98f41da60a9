"""Where sharing across layers pays: formulas against brute force, and the experiments run and continue."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from benchmarks.results import Results
from benchmarks.sharing.formulas import (
    Seen,
    at,
    common,
    frontier,
    own_losses,
    polished,
    pooled,
    rests,
    shared_losses,
)
from benchmarks.sharing.tables import sharing_map, sharing_plans, sharing_ways
from benchmarks.sharing.windows import hybrids, private_curve, spread, window
from tests.families import tiny_model

ROOT = Path(__file__).parents[1]
D, OTHER = 8, 12


class Matrix:
    """A matrix with the inputs and gradients that it saw, all written out."""

    def __init__(self, seed: int, weight: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.x, self.g = random(40, D) @ random(D, D), random(40, OTHER) @ random(OTHER, OTHER)
        self.weight = random(D, OTHER) if weight is None else weight
        gram, gamma = self.x.T @ self.x, self.g.T @ self.g
        self.seen = Seen(gram, self.weight @ gamma @ self.weight.T, OTHER)
        values, axes = torch.linalg.eigh(gamma)
        self.half = axes * values.sqrt() @ axes.T

    def least(self, basis: Tensor, private: int = 0) -> float:
        """min ‖X(W − BC − P)Γ^½‖² over C, and over P of a rank, by least squares and an SVD."""
        target, seen = self.x @ self.weight @ self.half, self.x @ basis
        rest = target - seen @ torch.linalg.lstsq(seen, target).solution
        return float(torch.linalg.svdvals(rest)[private:].square().sum())


@pytest.fixture(scope="module")
def matrices() -> list[Matrix]:
    return [Matrix(0), Matrix(1), Matrix(2)]


def test_losses_are_those_of_least_squares(matrices):
    members = [matrix.seen for matrix in matrices]
    basis = pooled(members)
    curve = shared_losses(members, basis)
    for rank in range(1, D + 1):
        wanted = sum(matrix.least(basis[:, :rank]) for matrix in matrices)
        assert float(curve[rank]) == pytest.approx(wanted, rel=1e-8, abs=1e-8 * float(curve[0]))
    for matrix, left in zip(matrices, rests(members, basis[:, :3]), strict=True):
        assert float(left[2]) == pytest.approx(matrix.least(basis[:, :3], private=2), rel=1e-8)


def test_the_best_own_basis_is_that_of_an_svd(matrices):
    for matrix in matrices:
        values = torch.linalg.svdvals(matrix.x @ matrix.weight @ matrix.half).square()
        found = own_losses(matrix.seen)
        assert found[3] == pytest.approx(float(values[3:].sum()), rel=1e-8)
        assert shared_losses([matrix.seen], pooled([matrix.seen]))[3] == pytest.approx(float(found[3]), rel=1e-8)


def test_the_output_side_is_the_same_problem_turned_round():
    """Seen from its outputs, W under X and Γ is Wᵀ under Γ^½ and XᵀX."""
    matrix = Matrix(3)
    gram, gamma = matrix.x.T @ matrix.x, matrix.g.T @ matrix.g
    turned = Seen(gamma, matrix.weight.T @ gram @ matrix.weight, D)
    assert torch.allclose(own_losses(turned), own_losses(matrix.seen)[: D + 1], rtol=1e-8, atol=1e-6)


def test_common_directions_are_found_where_there_are_some():
    """Two matrices whose best three directions span one space share it without loss."""
    weight = torch.randn(3, OTHER, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    into = torch.randn(D, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    matrices = [Matrix(6, into @ weight), Matrix(7, into @ weight.flip(1))]
    members = [matrix.seen for matrix in matrices]
    for basis in (common(members, 3), pooled(members)):
        curve = shared_losses(members, basis)
        assert float(curve[3]) < 1e-9 * float(curve[0])
        assert float(curve[2]) > 1e-6 * float(curve[0])


def test_common_directions_maximise_their_quotient(matrices):
    members = [matrix.seen for matrix in matrices]
    wanted, total = torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64)
    for matrix in matrices:
        u, _, _ = torch.linalg.svd(matrix.seen.root @ matrix.weight @ matrix.half)
        best = matrix.seen.root.T @ u[:, :3]
        wanted, total = wanted + best @ best.T, total + matrix.x.T @ matrix.x
    values = torch.linalg.eigvals(torch.linalg.solve(total, wanted)).real.sort(descending=True).values
    basis = common(members, 3)
    quotients = (basis * (wanted @ basis)).sum(0) / (basis * (total @ basis)).sum(0)
    assert torch.allclose(quotients, values, atol=1e-9)


@pytest.mark.parametrize("private", [(), (1, 2, 0)])
def test_polishing_finds_what_a_general_optimizer_finds(matrices, private):
    members = [matrix.seen for matrix in matrices]
    ranks = private or (0, 0, 0)

    def loss(basis: Tensor) -> float:
        return sum(float(left[rank]) for left, rank in zip(rests(members, basis), ranks, strict=True))

    start = basis = pooled(members)[:, :2]
    for _ in range(60):
        basis = polished(members, basis, private)
    assert loss(basis) < loss(start)
    free = start.clone(memory_format=torch.contiguous_format).requires_grad_()
    optimizer = torch.optim.LBFGS([free], max_iter=500, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = free.new_zeros(())
        for matrix, rank in zip(matrices, ranks, strict=True):
            q = torch.linalg.qr(matrix.seen.root @ free).Q
            rest = matrix.seen.root @ matrix.weight @ matrix.half
            rest = rest - q @ (q.T @ rest)
            total = total + torch.linalg.svdvals(rest)[rank:].square().sum()
        total.backward()
        return total

    optimizer.step(closure)
    assert loss(basis) == pytest.approx(loss(free.detach()), rel=1e-3)


def test_a_frontier_is_the_best_of_all_splits(matrices):
    curves = [private_curve(matrix.seen) for matrix in matrices]
    sizes, losses, entries = frontier(curves)
    everything = list(itertools.product(*(range(len(size)) for size, _ in curves)))
    for size, loss, chosen in zip(sizes, losses, entries, strict=True):
        totals = [sum(float(curves[j][i][e]) for j, e in enumerate(split)) for split in everything for i in (0, 1)]
        best = min(least for took, least in zip(totals[::2], totals[1::2], strict=True) if took <= float(size))
        assert float(loss) == pytest.approx(best)
        assert float(size) == sum(float(curve[0][e]) for curve, e in zip(curves, chosen, strict=True))
    assert at(sizes, losses, float(sizes[3])) == pytest.approx(float(losses[3]))
    middle = float(sizes[3] + sizes[4]) / 2
    assert at(sizes, losses, middle) == pytest.approx(float(losses[3] + losses[4]) / 2)
    assert at(sizes, losses, 0) == float(losses[0])
    assert at(sizes, losses, 1e9) == float(losses[-1])


def test_equal_matrices_save_what_the_bound_says():
    """A basis of two equal matrices is stored once, and nothing is lost: sharing is as good as its bound."""
    member = Matrix(8).seen
    found = window([member, member], 0.5, polish=True)
    for way in ("pooled", "shared"):
        assert found[way] == pytest.approx(found["bound"], rel=1e-3)
        assert found[way][2] > 0.1
    assert found["hybrid"][2] < found["pooled"][2]


def test_hybrids_stay_within_their_size_and_lose_what_they_say(matrices):
    members = [matrix.seen for matrix in matrices]
    for name, (size, loss) in hybrids(members, 0.6, [pooled(members)], polish=True).items():
        assert size <= 0.6 * 3 * D * OTHER, name
        assert loss < float(shared_losses(members, pooled(members))[0])


def test_windows_are_spread_over_the_depth():
    assert spread(10, 2, 1, 3) == [(0, 1), (4, 5), (8, 9)]
    assert spread(6, 2, 5, 4) == [(0, 5)]
    assert spread(6, 2, 10, 4) == []
    assert spread(4, 3, 1, 9) == [(0, 1, 2), (1, 2, 3)]


MATRIX = {
    "keeps": [0.6],
    "shapes": [{"layers": 2, "distance": 1}, {"layers": 3, "distance": 1}, {"layers": 2, "distance": 10}],
    "thorough": [{"layers": 2, "distance": 1}],
    "plans": {
        "private": {},
        "offered": {"offered": [2, 3]},
        "down pairs": {"forced": ["down"], "layers": 2},
        "gate triples": {"forced": ["gate"], "layers": 3},
    },
    "models": {
        "tiny": {
            "text": {"text": "letters", "blocks": 16, "length": 32, "held_out": 4, "test": 4},
            "windows": 2,
            "polished": 1,
            "plans": {0.6: ["private", "offered", "down pairs", "gate triples"]},
            "steps": ["refit", "refine"],
            "further": ["gate triples"],
        },
        "elsewhere": {"text": {"text": "letters"}},
    },
}


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer, words, commands) -> Results:
    """What the command writes, run twice."""
    folder = tmp_path_factory.mktemp("sharing")
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "letters.txt").write_text("\n".join(words))
    (folder / "matrix.yaml").write_text(yaml.safe_dump(MATRIX))
    command = [str(commands / "python"), "-m", "benchmarks.sharing.run", "--matrix", "matrix.yaml"]
    command += ["--results", "results.jsonl", "--path", "tiny=model", "--path", "letters=letters.txt"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    printed = []
    for _ in range(2):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert "elsewhere: left out; say where it is with --path elsewhere=FOLDER" in printed[0]
    assert "tiny/plan/0.6-offered" in printed[0]
    assert "tiny/" not in printed[1]
    return Results(folder / "results.jsonl")


@pytest.fixture
def results(written) -> dict[str, dict]:
    return written.read()


def test_the_map_has_every_role_and_shape(results):
    found = results["tiny/map/gate-2x1"]["found"]
    assert [each["layers"] for each in found] == [[0, 1], [2, 3]]
    assert "shared" in found[0]["0.6"]
    assert "shared" not in found[1]["0.6"]
    assert found[0]["0.6"]["shared"][0] <= found[0]["0.6"]["pooled"][0]
    assert "hybrid" in found[0]["0.6"]
    assert "hybrid" not in results["tiny/map/gate-3x1"]["found"][0]["0.6"]
    assert results["tiny/map/gate-2x10"]["found"] == []
    assert len([name for name in results if name.startswith("tiny/map/")]) == 21


def test_plans_of_one_size_are_measured(results):
    plans = {name.partition("-")[2]: each for name, each in results.items() if "/plan/" in name}
    assert set(plans) == {"private", "offered", "down pairs", "gate triples"}
    size = plans["private"]["found"]["parameters"]
    for each in plans.values():
        assert size * 0.98 <= each["found"]["parameters"] <= size
        assert len(each["found"]["kl"]["solved"]) == 4
        assert min(each["found"]["kl"]["solved"]) > 0
    assert plans["private"]["found"]["groups"] == []
    assert plans["gate triples"]["found"]["groups"] == ["gate.00-01-02"]
    assert plans["offered"]["found"]["predicted"] <= plans["private"]["found"]["predicted"] * 1.001
    assert list(plans["gate triples"]["found"]["kl"]) == ["solved", "refit", "refine"]
    assert plans["private"]["experiment"]["texts"]["test"]["tokens_sha256"]


def test_tables_compare_with_plans_that_share_nothing(written, results, tmp_path):
    assert "| 40% | `gate` |" in sharing_map(written, "tiny")
    assert "2 layers, 10 apart" not in sharing_map(written, "tiny")  # there are none
    assert sharing_ways(written, "tiny").count("\n") == 8
    page = sharing_plans(written, "tiny")
    private, pairs = (results[f"tiny/plan/0.6-{name}"]["found"]["kl"]["solved"] for name in ("private", "down pairs"))
    assert "| down pairs | 2 | " in page
    assert "*offered* shares " in page
    assert f"{sum(pairs) / sum(private) - 1:+.1%} ± " in page
    assert "Not measured yet" in sharing_plans(written, "elsewhere")
    other = results["tiny/plan/0.6-private"]
    other["experiment"]["texts"]["test"]["tokens_sha256"] = "another"
    mixed = Results(tmp_path / "mixed.jsonl")
    mixed.write(results)
    with pytest.raises(ValueError, match=r"of different texts; run `python -m benchmarks\.sharing\.run` again"):
        sharing_plans(mixed, "tiny")
