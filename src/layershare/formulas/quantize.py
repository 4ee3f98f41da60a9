"""Weights as numbers of few bits: rounding, GPTQ's compensation of what it loses, and codes in bytes.

A weight W (out × in, as `nn.Linear` stores it) is ŵ = s·v(q) with codes q, what they stand for, v, and one scale s for
each group of neighbours along the input; the last group may be shorter. `Numbers` has the v of each scheme.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from layershare.values import Scheme

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What a float of 4 bits can be, beside its sign: two bits of exponent, one of mantissa."""
_E4M3 = 448.0
"""The largest float of 8 bits with four bits of exponent and three of mantissa."""
_E8M0 = 127
"""The bias of a scale of 8 bits that is all exponent."""
SHRINKS = tuple(1 - i / 20 for i in range(13))
"""What a group's largest number may be clipped to, relative to itself."""
DAMPING = 0.01
"""Added to a Gram matrix, relative to its mean eigenvalue; GPTQ's."""
_PANEL = 128
_TOGETHER = 2**15
"""Numbers that are tried with all shrinks at once: few enough to stay in a processor's cache."""


@dataclass(frozen=True)
class Numbers:
    """What numbers of so many bits stand for, with a scale for each `group` of them.

    `int`: whole numbers |v| ≤ 2^(bits − 1) − 1, with scales of the model's type. Of 2 or 3 bits, which would lose a
    fourth or an eighth of what they can say that way, v = q + ½ with −2^(bits − 1) ≤ q < 2^(bits − 1).
    `mxfp4`: ±`E2M1`, with scales that are powers of two, of 8 bits (OCP Microscaling Formats, version 1.0).
    `nvfp4`: ±`E2M1`, with scales of 8 bits, E4M3, times one number for the whole weight, here a power of two.
    """

    bits: int
    group: int = 64
    scheme: Scheme = "int"

    @property
    def step(self) -> float:
        """The distance between neighbouring integers, relative to the largest one."""
        return 1 / (2 ** (self.bits - 1) - 1 + self._offset)

    def scales(self, largest: Tensor, dtype: torch.dtype) -> Tensor:
        """Scales that can be stored (of that dtype), with which groups reach about their `largest` numbers."""
        if self.scheme == "int":
            return (largest * self.step).to(dtype)
        wanted = largest.double() / E2M1[-1]
        if self.scheme == "mxfp4":
            return torch.exp2(_exponents(wanted, _E8M0)).to(dtype)
        whole = _whole(wanted)
        return ((wanted / whole).to(torch.float8_e4m3fn).double() * whole).to(dtype)

    def values(self, codes: Tensor, steps: Tensor) -> Tensor:
        """The numbers that codes stand for, whose scales are `steps`."""
        if self.scheme == "int":
            return (codes + self._offset) * steps
        table = torch.tensor([*E2M1, *(-each for each in E2M1)], dtype=steps.dtype, device=steps.device)
        return table[codes.long() & 15] * steps

    def nearest(self, weight: Tensor, steps: Tensor) -> Tensor:
        """The codes of the nearest numbers, in w's type; no step may be 0. A float's sign is that of its code."""
        if self.scheme == "int":
            most = 2 ** (self.bits - 1) - 1
            return (weight / steps - self._offset).round_().clamp_(-most - 2 * self._offset, most)
        numbers = torch.tensor(E2M1, dtype=weight.dtype, device=weight.device)
        places = torch.bucketize((weight / steps).abs(), (numbers[1:] + numbers[:-1]) / 2)
        return torch.where((weight < 0) & (places > 0), places - len(E2M1), places).to(weight.dtype)

    @property
    def _offset(self) -> float:
        return 0.5 if self.bits < 4 else 0.0


def stored_scales(scales: Tensor, numbers: Numbers) -> dict[str, Tensor]:
    """The tensors that scales are stored as, by name: without loss if `Numbers.scales` made them."""
    if numbers.scheme == "int":
        return {"scales": scales}
    if numbers.scheme == "mxfp4":
        return {"scales": (_exponents(scales.double(), _E8M0) + _E8M0).to(torch.uint8)}
    whole = _whole(scales.double())
    bytes_ = (scales.double() / whole).to(torch.float8_e4m3fn).view(torch.uint8)
    return {"scales": bytes_, "tensor_scale": whole.to(scales.dtype).reshape(1, 1)}


def read_scales(stored: Mapping[str, Tensor], numbers: Numbers, dtype: torch.dtype) -> Tensor:
    """The scales of `stored_scales`, in that dtype."""
    scales = stored["scales"]
    if numbers.scheme == "int":
        return scales.to(dtype)
    if numbers.scheme == "mxfp4":
        return torch.exp2(scales.float() - _E8M0).to(dtype)
    return (scales.view(torch.float8_e4m3fn).float() * stored["tensor_scale"].float()).to(dtype)


def _exponents(scales: Tensor, most: int) -> Tensor:
    """The exponents of the next powers of two, as far as there are any."""
    return scales.log2().ceil().clamp(-most, most)


def _whole(scales: Tensor) -> Tensor:
    """The power of two by which all scales of a weight are floats of 8 bits: one that every floating type has."""
    return torch.exp2(_exponents(scales.max() / _E4M3, 14))


def best_scales(weight: Tensor, numbers: Numbers, dtype: torch.dtype, importance: Tensor | None = None) -> Tensor:
    """The scales (out × ⌈in / group⌉, of that dtype) of least Σ hⱼ(wⱼ − ŵⱼ)² under rounding, among `SHRINKS`.

    `importance`: h (in), the diagonal of the Gram of the inputs; `None`: all the same.
    """
    group = numbers.group
    ahead = -weight.shape[1] % group
    groups = torch.nn.functional.pad(weight.double(), (0, ahead)).unflatten(1, (-1, group))
    counts = torch.ones(weight.shape[1]) if importance is None else importance
    counts = torch.nn.functional.pad(counts.to(groups), (0, ahead)).unflatten(0, (-1, group))
    some = max(1, _TOGETHER // groups[0].numel())
    tops = groups.abs().amax(-1)
    tried = torch.stack([numbers.scales(tops * shrink, dtype) for shrink in SHRINKS])
    parts = zip(groups.split(some), tried.split(some, 1), strict=True)
    return torch.cat([_best(rows, counts, numbers, scales) for rows, scales in parts])


def _best(groups: Tensor, counts: Tensor, numbers: Numbers, tried: Tensor) -> Tensor:
    """The best of the scales that are tried (ways × out × groups), of some rows, out × groups × numbers."""
    best, least = tried[0], torch.full(tried[0].shape, torch.inf, dtype=groups.dtype, device=groups.device)
    for scales in tried:
        steps = scales.double()[..., None]
        missing = groups - numbers.values(numbers.nearest(groups, _divisible(steps)), steps)
        error = (counts * missing.square()).sum(-1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def rounded(weight: Tensor, scales: Tensor, numbers: Numbers) -> Tensor:
    """q (out × in, int8): the nearest numbers."""
    steps = _spread(scales.double(), numbers.group, weight.shape[1])
    return numbers.nearest(weight.double(), _divisible(steps)).to(torch.int8)


def compensated(weight: Tensor, gram: Tensor, scales: Tensor, numbers: Numbers) -> Tensor:
    """q (out × in, int8) by GPTQ, for small ‖X(W − Ŵ)ᵀ‖² with G = XᵀX (in × in).

    One column after the other is rounded, those of the largest Gᵢᵢ first, and what that loses is made up for by all
    columns that are still to come: with H = G + λ1 and the upper Cholesky factor U of H⁻¹, column j's error
    e = (wⱼ − ŵⱼ)/Uⱼⱼ changes W by −e·Uⱼ. Each row is treated by itself. Columns are updated lazily, a panel at a
    time. Paper: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv 2210.17323.
    The order by Gᵢᵢ and scales that are fixed beforehand are later options of the authors' code (`--act-order`,
    `--static-groups`). Being greedy it can be unlucky: a row that plain rounding leaves nearer is rounded.
    """
    nearest = rounded(weight, scales, numbers)
    found = _one_by_one(weight, gram, scales, numbers)
    steps = _spread(scales.double(), numbers.group, weight.shape[1])

    def error(codes: Tensor) -> Tensor:
        missing = weight.double() - numbers.values(codes, steps)
        return (missing @ gram.double() * missing).sum(1, keepdim=True)

    return found.where(error(found) <= error(nearest), nearest)


def _one_by_one(weight: Tensor, gram: Tensor, scales: Tensor, numbers: Numbers) -> Tensor:
    """What GPTQ finds for each row."""
    gram = gram.double()
    order = gram.diagonal().argsort(descending=True, stable=True)
    # Transposed, so that a column lies in one piece.
    steps = _spread(scales.double(), numbers.group, weight.shape[1])[:, order].T.contiguous()
    left = weight.double()[:, order].T.contiguous()
    damping = DAMPING * gram.diagonal().mean() or 1.0  # inputs that are all zero: plain rounding
    damped = gram[order][:, order] + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    codes, divisible = torch.empty_like(left), _divisible(steps)
    for start in range(0, len(gram), _PANEL):
        end = min(start + _PANEL, len(gram))
        errors = torch.empty_like(left[start:end])
        for j in range(start, end):
            codes[j] = numbers.nearest(left[j], divisible[j])
            errors[j - start] = (left[j] - numbers.values(codes[j], steps[j])) / upper[j, j]
            left[j + 1 : end].addr_(upper[j, j + 1 : end], errors[j - start], alpha=-1)
        left[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return codes[order.argsort()].T.to(torch.int8)


def as_stored(weight: Tensor, gram: Tensor, numbers: Numbers, dtype: torch.dtype) -> Tensor:
    """Ŵ (out × in, float64) by GPTQ, with scales of that dtype."""
    scales = best_scales(weight, numbers, dtype, gram.diagonal())
    codes = compensated(weight, gram, scales, numbers)
    return numbers.values(codes, _spread(scales.double(), numbers.group, weight.shape[1]))


def fitted_to(first: Tensor, second: Tensor, quantized: Tensor, gram: Tensor) -> Tensor:
    """C' (out × r) of least ‖X(C·B − C'·B̂)ᵀ‖²: a second factor C, fitted to a first one B (r × in) that became B̂.

    C' = C·BGB̂ᵀ(B̂GB̂ᵀ)⁻¹ with G = XᵀX (in × in); λ1 beside both Grams draws it towards C. So what quantizing the first
    factor lost is made up for by the second, as far as the inputs allow.
    """
    before, after = (each.double() @ gram.double() @ quantized.double().T for each in (first, quantized))
    damping = (DAMPING * after.diagonal().mean() or 1.0) * torch.eye(len(after), dtype=after.dtype, device=after.device)
    return second.double() @ torch.linalg.solve(after + damping, before + damping, left=False)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Eight numbers of b bits in b bytes, the first one lowest: int8 out × in to uint8 out × b⌈in / 8⌉ (8: as is)."""
    if bits == 8:
        return codes
    ahead = -codes.shape[1] % 8
    octets = torch.nn.functional.pad(codes, (0, ahead)).unflatten(1, (-1, 8)).short() & (1 << bits) - 1
    stored = octets.new_zeros(*octets.shape[:2], bits)
    for i in range(8):
        byte, shift = divmod(bits * i, 8)
        stored[..., byte] |= octets[..., i] << shift & 255
        if shift + bits > 8:
            stored[..., byte + 1] |= octets[..., i] >> 8 - shift
    return stored.flatten(1).to(torch.uint8)


def unpacked(stored: Tensor, bits: int, columns: int) -> Tensor:
    """The numbers of `packed`, int8 out × `columns`."""
    if bits == 8:
        return stored
    octets = stored.unflatten(1, (-1, bits)).short()
    numbers = []
    for i in range(8):
        byte, shift = divmod(bits * i, 8)
        number = octets[..., byte] >> shift
        numbers.append(number | octets[..., byte + 1] << 8 - shift if shift + bits > 8 else number)
    sign = 1 << bits - 1
    codes = torch.stack(numbers, -1).flatten(1)[:, :columns] & 2 * sign - 1
    return ((codes ^ sign) - sign).to(torch.int8)


def dense_weight(stored: Mapping[str, Tensor], numbers: Numbers, columns: int, dtype: torch.dtype) -> Tensor:
    """Ŵ (out × `columns`, of that dtype) of its packed `codes` and its stored scales."""
    steps = _spread(read_scales(stored, numbers, dtype), numbers.group, columns)
    return numbers.values(unpacked(stored["codes"], numbers.bits, columns), steps).to(dtype)


def _spread(scales: Tensor, group: int, columns: int) -> Tensor:
    """The scale of every number (out × `columns`)."""
    return scales.repeat_interleave(group, 1)[:, :columns]


def _divisible(steps: Tensor) -> Tensor:
    """The steps, 1 in the place of 0, with which all codes stand for 0."""
    return steps.where(steps != 0, 1)
