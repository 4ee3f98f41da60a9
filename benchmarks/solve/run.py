"""The eigenproblem against the published SVD of S[W₁ W₂]: seconds and error. Writes results.json beside this file.

Beside both, one `eigh` of the same matrix is timed: what no route over an eigenproblem can undercut. Seconds are
processor time of one thread, which other work on the machine changes little.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from layershare.formulas.linalg import share_input
from layershare.report.results import environment

LAYERS, KEEP = 2, 0.8
SHAPES = [(width, int(width * ratio)) for width in (1024, 2048) for ratio in (1, 2.7)]

T = TypeVar("T")
Product = tuple[Tensor, list[Tensor]]
"""A basis d_in × k and the coefficients k × d_out of each layer."""


def eigen(weights: list[Tensor], grams: list[Tensor], rank: int) -> Product:
    """What the package does."""
    factors = share_input(weights, grams, rank)
    return factors.basis, list(factors.coefs)


def concatenated(weights: list[Tensor], grams: list[Tensor], rank: int) -> Product:
    """What the paper and its code do: Cholesky S of ΣGᵢ, SVD of S[W₁ … W_n], basis S⁻¹U_kΣ_k, coefficients V_kᵀ."""
    root = torch.linalg.cholesky(torch.stack(grams).sum(0).double()).T  # SᵀS = G
    joined = torch.cat([weight.double() for weight in weights], dim=1)
    u, values, vt = torch.linalg.svd(root @ joined, full_matrices=False)
    basis = torch.linalg.solve_triangular(root, u[:, :rank] * values[:rank], upper=True)
    return basis, list(vt[:rank].split([weight.shape[1] for weight in weights], dim=1))


def relative_error(weights: list[Tensor], grams: list[Tensor], product: Product) -> float:
    """Σ‖X(Wᵢ − BCᵢ)‖² / Σ‖XWᵢ‖² with the Gram of the whole group, as both minimise it."""
    gram, (basis, coefs) = torch.stack(grams).sum(0).double(), product
    missing = [weight.double() - basis @ coef for weight, coef in zip(weights, coefs, strict=True)]
    wide = [weight.double() for weight in weights]
    return sum(float((m * (gram @ m)).sum()) for m in missing) / sum(float((w * (gram @ w)).sum()) for w in wide)


def problem(d_in: int, d_out: int) -> tuple[list[Tensor], list[Tensor]]:
    """Random weights and Grams with the decaying spectra that real ones have."""
    torch.manual_seed(0)
    decay = torch.arange(1, d_in + 1).pow(-0.5)
    axes = torch.linalg.qr(torch.randn(d_in, d_in))[0]
    weights = [(axes * decay) @ torch.randn(d_in, d_out) for _ in range(LAYERS)]
    inputs = [torch.randn(4 * d_in, d_in) * decay @ torch.linalg.qr(torch.randn(d_in, d_in))[0] for _ in range(LAYERS)]
    return weights, [x.T @ x for x in inputs]


def whitened_moment(weights: list[Tensor], grams: list[Tensor]) -> Tensor:
    """S(ΣWᵢWᵢᵀ)Sᵀ, whose eigenvectors are wanted."""
    root = torch.linalg.cholesky(torch.stack(grams).sum(0).double()).T
    halves = [root @ weight.double() for weight in weights]
    return torch.stack([half @ half.T for half in halves]).sum(0)


def timed(solve: Callable[[], T]) -> tuple[float, T]:
    start = time.process_time()
    result = solve()
    return time.process_time() - start, result


def compare(d_in: int, d_out: int, repeats: int) -> dict[str, object]:
    """Both routes in turn, so that a busy machine slows both; medians of all repeats."""
    weights, grams = problem(d_in, d_out)
    rank = int(KEEP * d_in * d_out * LAYERS / (d_in + LAYERS * d_out))
    whitened = whitened_moment(weights, grams)
    seconds: dict[str, list[float]] = {"eigen": [], "svd": [], "eigh": []}
    products: dict[str, Product] = {}
    for _ in range(repeats):
        for name, solve in (("eigen", eigen), ("svd", concatenated)):
            taken, products[name] = timed(lambda solve=solve: solve(weights, grams, rank))
            seconds[name].append(taken)
        seconds["eigh"].append(timed(lambda: torch.linalg.eigh(whitened))[0])
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    errors = {name: relative_error(weights, grams, product) for name, product in products.items()}
    return {
        "d_in": d_in,
        "d_out": d_out,
        "layers": LAYERS,
        "rank": rank,
        "seconds": {name: [round(value, 3) for value in taken] for name, taken in seconds.items()},
        "speedup": round(medians["svd"] / medians["eigen"], 2),
        "speedup_of_eigh_alone": round(medians["svd"] / medians["eigh"], 2),
        "speedup_of_pairs": [round(b / a, 2) for a, b in zip(seconds["eigen"], seconds["svd"], strict=True)],
        "relative_error": errors,
        "errors_differ_by": abs(errors["eigen"] / errors["svd"] - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    rows = []
    for d_in, d_out in SHAPES:
        rows.append(compare(d_in, d_out, repeats))
        print(json.dumps(rows[-1]), flush=True)
    results = {"keep": KEEP, "rows": rows, **environment()}
    Path(__file__).with_name("results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
