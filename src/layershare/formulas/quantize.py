"""Weights as small integers: rounding, GPTQ's compensation of what it loses, and numbers of few bits in bytes.

A weight W (out × in, as `nn.Linear` stores it) is ŵ = s·q with whole numbers |q| ≤ 2^(bits − 1) − 1 and one scale s for
each group of neighbours along the input; the last group may be shorter. Of 2 or 3 bits, which would lose a fourth or an
eighth of what they can say that way, ŵ = s·(q + ½) with −2^(bits − 1) ≤ q < 2^(bits − 1).
"""

import torch
from torch import Tensor

SHRINKS = tuple(1 - i / 20 for i in range(13))
"""What a group's largest number may be clipped to, relative to itself."""
DAMPING = 0.01
"""Added to a Gram matrix, relative to its mean eigenvalue; GPTQ's."""
_PANEL = 128
_TOGETHER = 2**15
"""Numbers that are tried with all shrinks at once: few enough to stay in a processor's cache."""


def best_scales(weight: Tensor, bits: int, group: int, dtype: torch.dtype, importance: Tensor | None = None) -> Tensor:
    """The scales (out × ⌈in / group⌉, of that dtype) of least Σ hⱼ(wⱼ − ŵⱼ)² under rounding, among `SHRINKS`.

    `importance`: h (in), the diagonal of the Gram of the inputs; `None`: all the same.
    """
    ahead = -weight.shape[1] % group
    groups = torch.nn.functional.pad(weight.double(), (0, ahead)).unflatten(1, (-1, group))
    counts = torch.ones(weight.shape[1]) if importance is None else importance
    counts = torch.nn.functional.pad(counts.to(groups), (0, ahead)).unflatten(0, (-1, group))
    some = max(1, _TOGETHER // groups[0].numel())
    return torch.cat([_best(rows, counts, bits, dtype) for rows in groups.split(some)])


def _best(groups: Tensor, counts: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The scales of some rows, out × groups × numbers."""
    top = groups.abs().amax(-1) * step(bits)
    best, least = top, torch.full_like(top, torch.inf)
    for shrink in SHRINKS:
        scales = (top * shrink).to(dtype).double()
        steps = scales[..., None]
        error = (counts * (groups - _values(_nearest(groups, _divisible(steps), bits), steps, bits)).square()).sum(-1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best.to(dtype)


def rounded(weight: Tensor, scales: Tensor, bits: int, group: int) -> Tensor:
    """q (out × in, int8): the nearest numbers."""
    steps = _spread(scales.double(), group, weight.shape[1])
    return _nearest(weight.double(), _divisible(steps), bits).to(torch.int8)


def compensated(weight: Tensor, gram: Tensor, scales: Tensor, bits: int, group: int) -> Tensor:
    """q (out × in, int8) by GPTQ, for small ‖X(W − Ŵ)ᵀ‖² with G = XᵀX (in × in).

    One column after the other is rounded, those of the largest Gᵢᵢ first, and what that loses is made up for by all
    columns that are still to come: with H = G + λ1 and the upper Cholesky factor U of H⁻¹, column j's error
    e = (wⱼ − ŵⱼ)/Uⱼⱼ changes W by −e·Uⱼ. Each row is treated by itself. Columns are updated lazily, a panel at a
    time. Paper: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv 2210.17323.
    The order by Gᵢᵢ and scales that are fixed beforehand are later options of the authors' code (`--act-order`,
    `--static-groups`). Being greedy it can be unlucky: a row that plain rounding leaves nearer is rounded.
    """
    nearest = rounded(weight, scales, bits, group)
    found = _one_by_one(weight, gram, scales, bits, group)
    steps = _spread(scales.double(), group, weight.shape[1])

    def error(codes: Tensor) -> Tensor:
        missing = weight.double() - _values(codes, steps, bits)
        return (missing @ gram.double() * missing).sum(1, keepdim=True)

    return found.where(error(found) <= error(nearest), nearest)


def _one_by_one(weight: Tensor, gram: Tensor, scales: Tensor, bits: int, group: int) -> Tensor:
    """What GPTQ finds for each row."""
    gram = gram.double()
    order = gram.diagonal().argsort(descending=True, stable=True)
    # Transposed, so that a column lies in one piece.
    steps = _spread(scales.double(), group, weight.shape[1])[:, order].T.contiguous()
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
            codes[j] = _nearest(left[j], divisible[j], bits)
            errors[j - start] = (left[j] - _values(codes[j], steps[j], bits)) / upper[j, j]
            left[j + 1 : end].addr_(upper[j, j + 1 : end], errors[j - start], alpha=-1)
        left[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return codes[order.argsort()].T.to(torch.int8)


def as_integers(weight: Tensor, gram: Tensor, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """Ŵ (out × in, float64) by GPTQ, with scales of that dtype."""
    scales = best_scales(weight, bits, group, dtype, gram.diagonal())
    codes = compensated(weight, gram, scales, bits, group)
    return _values(codes, _spread(scales.double(), group, weight.shape[1]), bits)


def step(bits: int) -> float:
    """The distance between neighbours that can be stored, relative to the largest one."""
    return 1 / (2 ** (bits - 1) - 1 + _offset(bits))


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


def dense_weight(stored: Tensor, scales: Tensor, bits: int, group: int, columns: int) -> Tensor:
    """Ŵ (out × `columns`, of the scales' dtype) of its packed numbers and its scales."""
    steps = _spread(scales, group, columns)
    return _values(unpacked(stored, bits, columns), steps, bits).to(scales.dtype)


def _offset(bits: int) -> float:
    return 0.5 if bits < 4 else 0.0


def _spread(scales: Tensor, group: int, columns: int) -> Tensor:
    """The scale of every number (out × `columns`)."""
    return scales.repeat_interleave(group, 1)[:, :columns]


def _values(codes: Tensor, steps: Tensor, bits: int) -> Tensor:
    """The numbers that codes stand for."""
    return (codes + _offset(bits)) * steps


def _nearest(weight: Tensor, steps: Tensor, bits: int) -> Tensor:
    """The codes of the nearest numbers, in w's type; no step may be 0."""
    most, offset = 2 ** (bits - 1) - 1, _offset(bits)
    return (weight / steps - offset).round_().clamp_(-most - 2 * offset, most)


def _divisible(steps: Tensor) -> Tensor:
    """The steps, 1 in the place of 0, with which all codes stand for 0."""
    return steps.where(steps != 0, 1)
