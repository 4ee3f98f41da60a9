"""Rounding and GPTQ against brute force."""

from itertools import product

import pytest
import torch
from torch import Tensor

from layershare.formulas.quantize import (
    DAMPING,
    E2M1,
    Numbers,
    best_scales,
    compensated,
    dense_weight,
    fitted_to,
    packed,
    rounded,
    stored_scales,
    unpacked,
)
from layershare.model.composition import BITS, FLOATS, Storage


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram of inputs that are much alike."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(200, columns, generator=generator, dtype=torch.float64)
    x += 2 * torch.randn(200, 1, generator=generator, dtype=torch.float64)
    return weight, x.T @ x


def error(weight: Tensor, approximation: Tensor, gram: Tensor) -> Tensor:
    """‖X(W − Ŵ)ᵀ‖² of each row."""
    missing = weight - approximation.double()
    return (missing @ gram * missing).sum(1)


def dense(codes: Tensor, scales: Tensor, numbers: Numbers) -> Tensor:
    """What is read of what is stored."""
    stored = {"codes": packed(codes, numbers.bits), **stored_scales(scales, numbers)}
    return dense_weight(stored, numbers, codes.shape[1], scales.dtype)


@pytest.mark.parametrize("columns", [1, 8, 23])
@pytest.mark.parametrize("bits", BITS)
def test_eight_numbers_fit_into_as_many_bytes_as_they_have_bits(bits, columns):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, columns), dtype=torch.int8)
    stored = packed(codes, bits)
    (shape, dtype) = Storage(bits).tensors(5, columns)["codes"]
    assert stored.shape == shape
    assert stored.dtype == getattr(torch, dtype or "")
    assert torch.equal(unpacked(stored, bits, columns), codes)


def test_numbers_stand_in_bytes_from_the_lowest_bit():
    codes = torch.tensor([[1, 2, 3, -4, -3, -2, -1, 0]], dtype=torch.int8)
    whole = sum((code & 7) << 3 * place for place, code in enumerate(codes[0].tolist()))
    assert bytes(packed(codes, 3)[0].tolist()) == whole.to_bytes(3, "little")


@pytest.mark.parametrize("bits", BITS)
def test_rounding_takes_the_nearest_number(bits):
    weight, _ = problem(3, 10)
    numbers = Numbers(bits, 4)
    scales = best_scales(weight, numbers, torch.float64)
    assert scales.shape == (3, 3)
    found, most = dense(rounded(weight, scales, numbers), scales, numbers), (2**bits - 1 - (bits > 3)) / 2
    for row, column in product(range(3), range(10)):
        choices = scales[row, column // 4] * torch.arange(-most, most + 1, dtype=torch.float64)
        assert (found[row, column] - weight[row, column]).abs() == (choices - weight[row, column]).abs().min()


def test_scales_are_no_worse_than_those_of_the_largest_number():
    weight, gram = problem(20, 64)
    importance = gram.diagonal()
    plain = weight.unflatten(1, (-1, 16)).abs().amax(-1) / 7
    numbers = Numbers(4, 16)
    best = best_scales(weight, numbers, torch.float64, importance)
    losses = [
        (importance * (weight - dense(rounded(weight, scales, numbers), scales, numbers)).square()).sum()
        for scales in (best, plain)
    ]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("numbers", [Numbers(4, 4), *(Storage(*how, scheme) for scheme, how in FLOATS.items())])
def test_groups_of_zeros_stay_zero(numbers):
    weight = torch.zeros(2, 40)
    weight[0, 30:] = 1e-3
    for given in (weight, torch.zeros_like(weight)):
        scales = best_scales(given, numbers, torch.float16)
        for codes in (rounded(given, scales, numbers), compensated(given, torch.zeros(40, 40), scales, numbers)):
            found = dense(codes, scales, numbers)
            torch.testing.assert_close(found, given.to(torch.float16), rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", FLOATS)
def test_floats_of_four_bits_are_the_nearest_that_there_are(scheme, dtype):
    bits, group = FLOATS[scheme]
    numbers = Storage(bits, group, scheme)
    weight = problem(5, 70)[0] * torch.logspace(-3, 0, 5)[:, None]
    scales = best_scales(weight, numbers, dtype)
    assert scales.dtype == dtype
    stored = stored_scales(scales, numbers)
    shapes = numbers.tensors(5, 70)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        name: shape for name, (shape, _) in shapes.items() if name != "codes"
    }
    found = dense(rounded(weight, scales, numbers), scales, numbers).double()
    values = torch.tensor([*E2M1, *(-each for each in E2M1)], dtype=torch.float64)
    for row, column in product(range(5), range(70)):
        choices = scales[row, column // group].double() * values
        missing = (found[row, column] - weight[row, column]).abs()
        assert missing == (choices - weight[row, column]).abs().min()


def test_scales_of_eight_bits_are_what_their_formats_say():
    largest = torch.tensor([[6.0, 12.0, 20.0, 0.7]], dtype=torch.float64)
    power, scale = Storage(4, 32, "mxfp4"), Storage(4, 16, "nvfp4")
    exponents = stored_scales(power.scales(largest, torch.float32), power)["scales"]
    assert (exponents.int() - 127).tolist() == [[0, 1, 2, -3]]
    stored = stored_scales(scale.scales(largest, torch.float32), scale)
    whole = float(stored["tensor_scale"])
    assert whole == 2**-7  # 20 / 6 / 448 is below it, and not below half of it
    wanted = (largest / 6 / whole).to(torch.float8_e4m3fn)
    assert torch.equal(stored["scales"].view(torch.float8_e4m3fn).float(), wanted.float())


def test_gptq_with_floats_is_better_than_rounding():
    weight, gram = problem(6, 64)
    for scheme, (bits, group) in FLOATS.items():
        numbers = Storage(bits, group, scheme)
        scales = best_scales(weight, numbers, torch.float64, gram.diagonal())
        ours, theirs = (
            error(weight, dense(codes, scales, numbers), gram).sum()
            for codes in (compensated(weight, gram, scales, numbers), rounded(weight, scales, numbers))
        )
        assert ours < 0.7 * theirs


def sequential(weight: Tensor, gram: Tensor, scales: Tensor, group: int) -> Tensor:
    """What GPTQ does, by its definition: after each rounding the best that the others can become, exactly."""
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    order = gram.diagonal().argsort(descending=True, stable=True).tolist()
    codes, target = torch.zeros_like(weight), weight.clone()
    for place, column in enumerate(order):
        step = scales[:, column // group]
        codes[:, column] = (target[:, column] / step).round().clamp(-7, 7)
        done, rest = order[: place + 1], order[place + 1 :]
        steps = torch.stack([scales[:, each // group] for each in done], 1)
        lost = weight[:, done] - codes[:, done] * steps
        target[:, rest] = weight[:, rest] + torch.linalg.solve(damped[rest][:, rest], damped[rest][:, done] @ lost.T).T
    return codes.to(torch.int8)


@pytest.mark.parametrize(("columns", "group"), [(10, 4), (300, 64)])
def test_gptq_is_the_sequential_optimum(columns, group):
    weight, gram = problem(4, columns)
    numbers = Numbers(4, group)
    scales = best_scales(weight, numbers, torch.float64, gram.diagonal())
    codes, reference = compensated(weight, gram, scales, numbers), sequential(weight, gram, scales, group)
    nearest = rounded(weight, scales, numbers)
    ours, theirs = (error(weight, dense(each, scales, numbers), gram) for each in (reference, nearest))
    assert torch.equal(codes, reference.where((ours <= theirs)[:, None], nearest))
    assert (ours <= theirs).any()


@pytest.mark.parametrize("seed", range(20))
def test_gptq_lies_between_rounding_and_the_best_of_all(seed):
    weight, gram = problem(6, 4, seed)
    numbers = Numbers(4, 4)
    scales = best_scales(weight, numbers, torch.float64)
    ours = error(weight, dense(compensated(weight, gram, scales, numbers), scales, numbers), gram)
    nearest = error(weight, dense(rounded(weight, scales, numbers), scales, numbers), gram)
    assert (ours <= nearest * (1 + 1e-9)).all()
    grid = torch.tensor(list(product(range(-7, 8), repeat=4)), dtype=torch.float64)
    for row in range(6):
        missing = weight[row] - scales[row] * grid
        best = (missing @ gram * missing).sum(1).min()
        assert ours[row] >= best * (1 - 1e-9)


def test_a_second_factor_is_fitted_to_what_the_first_one_became():
    first, gram = problem(3, 9)
    second = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    quantized = first + 0.1 * torch.randn(3, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    fitted, whole = fitted_to(first, second, quantized, gram), second @ first
    before, after = (error(whole, each @ quantized, gram).sum() for each in (second, fitted))
    assert after < 0.9 * before
    inner = quantized @ gram @ quantized.T
    ridge = DAMPING * inner.diagonal().mean()
    normal = (fitted @ quantized - whole) @ gram @ quantized.T
    torch.testing.assert_close(normal, ridge * (second - fitted))
    torch.testing.assert_close(fitted_to(first, second, first, gram), second)
