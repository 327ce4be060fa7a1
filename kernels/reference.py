"""The torch version of every kernel: plain, without autograd, any float dtype.

Shape letters, the same in every file of the project:

    T tokens   O out_features   I in_features   R rank of one slice   S slices
    N elements of the local flat shard          C rows that a shard or a chunk of it touches

`R` alone is the width of one slice; `Q` = S·R is the width of all slices side by side.
These functions run in float64 as well, which is what the tests compare against.
They import neither `engine` nor `torch.distributed`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

# Elements of the fp32 block of W's change that is materialised at a time: 4 MiB, which stays in a core's caches.
BLOCK_ELEMENTS = 2**20


def split_fp32(w_N: Tensor) -> tuple[Tensor, Tensor]:
    """Splits fp32 into its bf16 half and a signed 16-bit remainder, without loss.

    bits(w) = (bits(high) << 16) + low, with high rounded half up, so that low always fits
    int16 (round-half-even does not fit: the remainder reaches +32768). `high` equals
    torch's bf16 cast except at exact ties.

    A NaN whose payload carries over (0x7FFF8000 and above) shows as zero in `high`, one whose payload
    is below 0x8000 as infinity: look for NaN in the fp32 value, never in the half. Merging gives it
    back bit for bit.

    Example: 1.00390625 (0x3F808000, a tie) → high 1.0078125 (0x3F81), low −32768.

    Returns: (high, low), bf16 and int16 of w's shape.
    """
    bits = w_N.view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def merge_fp32(high_N: Tensor, low_N: Tensor) -> Tensor:
    """Inverse of `split_fp32`: fp32 from its bf16 half and 16-bit remainder, bit for bit."""
    bits = (high_N.view(torch.int16).to(torch.int32) << 16) + low_N.to(torch.int32)
    return bits.view(torch.float32)


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 instructions; torch emulates them elsewhere, 2 to 10 times slower than fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _thin(a: Tensor, b: Tensor) -> Tensor:
    """a b with a thin operand, in a's dtype; bf16 by way of fp32 where that is the fast path (same roundings)."""
    b = b.to(a.dtype)
    if a.dtype == torch.bfloat16 and a.device.type == "cpu" and not _cpu_multiplies_bf16():
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def low_rank_forward(x_TI: Tensor, A_RI: Tensor) -> Tensor:
    """p = x Aᵀ (T × R) in x's dtype: what the slice needs of the forward pass.

    Example: x = [[1, 2]], A = [[3, 4]] → p = [[11]].
    """
    return _thin(x_TI, A_RI.t())


def low_rank_grad_B_(
    grad_B_OR: Tensor, dy_TO: Tensor, p_TR: Tensor, B_OR: Tensor, q_TR: Tensor | None = None
) -> Tensor:
    """What the slice needs of dy: adds to grad B, and returns q for `low_rank_grad_A_`.

        q = dy B (T × R)         grad B += dyᵀ p (O × R)

    The O × I gradient of W is never formed. The products run in dy's dtype, grad B keeps its own
    (fp32 in training). A `q_TR` that `fused_linear` has made already is passed through.

    Example: dy = [[2]], p = [[11]], B = [[5]], grad B = [[1]] → q = [[10]], grad B = [[23]].
    """
    grad_B_OR.add_(_thin(p_TR.t(), dy_TO).t())  # this way round the long operand is read along its rows
    return _thin(dy_TO, B_OR) if q_TR is None else q_TR


def low_rank_grad_A_(grad_As: Sequence[Tensor], qs: Sequence[Tensor], x_TI: Tensor) -> None:
    """What x owes the slices: grad A += qᵀ x (R × I), for every Linear that reads this x.

    Args:
        grad_As, qs: one of each per Linear (q, k and v share their x, gate and up theirs); the ranks may differ.

    Example: q = [[10]], x = [[1, 2]], grad A = [[1, 1]] → grad A = [[11, 21]].
    """
    for grad_A_RI, q_TR in zip(grad_As, qs, strict=True):
        grad_A_RI.add_(_thin(q_TR.t(), x_TI))


def fused_linear(x_TI: Tensor, W_OI: Tensor, A_RI: Tensor, bias_O: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The layer's product and the slice's from one reading of x: y = x Wᵀ + b (T × O), p = x Aᵀ (T × R).

    The backward pass is the same product with transposed views: (dx, q) = fused_linear(dy, Wᵀ, Bᵀ).

    Example: x = [[1, 2]], W = [[1, 0]], A = [[3, 4]], b = [5] → y = [[6]], p = [[11]].

    Returns: (y, p) in x's dtype.
    """
    return torch.nn.functional.linear(x_TI, W_OI, bias_O), low_rank_forward(x_TI, A_RI)


def slice_adam_(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    grad_scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """One bias-corrected Adam step; moments in place, returns Δ already multiplied by the learning rate.

        m ← β₁ m + (1−β₁) g      v ← β₂ v + (1−β₂) g²      with g = grad · grad_scale
        Δ = lr · (m / (1−β₁ᵗ)) / (√(v / (1−β₂ᵗ)) + ε)      t = step, counted from 1

    No weight decay (method.md, step 3). All tensors flat and of one dtype. Δ comes in `dtype`: bf16 where that
    is what travels; default grad's own.

    Example: zero moments, g = 4, step 1, lr 0.1, ε 0 → Δ = 0.1.
    """
    beta1, beta2 = betas
    grad = grad * grad_scale
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.div(1 - beta2**step).sqrt_().add_(eps)
    return exp_avg.div(denominator).mul_(lr / (1 - beta1**step)).to(dtype or grad.dtype)


def dense_delta(
    dA_QI: Tensor,
    dB_CQ: Tensor,
    A_QI: Tensor,
    B_CQ: Tensor,
    *,
    start: int,
    numel: int,
    second_order: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The change of W on a flat range of its elements, summed over all given slices (method.md, step 4).

        D = Σ_i (ΔB_i A_i + B_i ΔA_i − ΔB_i ΔA_i) = ΔB (A − ΔA) + B ΔA

    with the slices side by side along Q = S·R. Without `second_order` the term ΔB ΔA is left out. W is
    row-major with I columns; the range is [start, start + numel), it may begin and end within a row, and
    the B factors hold the C rows that it touches. Products in the widest dtype given, fp32 at least.

    Example: A = [[1, 2]], B = [[3]], ΔA = [[0.5, 0]], ΔB = [[1]], start 0, numel 2
    → D = [2, 2] (first order [2.5, 2]); start 1, numel 1 → [2].

    Returns: flat (numel) in `dtype`.
    """
    result = torch.empty(numel, dtype=dtype, device=A_QI.device)
    for here, change in _delta_blocks(dA_QI, dB_CQ, A_QI, B_CQ, start, numel, second_order):
        result[here] = change.to(dtype)
    return result


def delta_apply_(
    parts: tuple[Tensor, ...],
    dA_QI: Tensor,
    dB_CQ: Tensor,
    A_QI: Tensor,
    B_CQ: Tensor,
    bad: Tensor,
    *,
    start: int,
    scale: float,
    second_order: bool,
    precision: Literal["fp32", "tf32"] = "fp32",
) -> None:
    """W ← W − scale · D on a flat range of W, in place; D as in `dense_delta`.

    Args:
        parts: how W is held, flat tensors of N elements:
            (high bf16, low int16)    split fp32, see `split_fp32`;
            (w fp32, half bf16)       an fp32 master and its rounding, ties up as in `split_fp32`;
            (w fp32,)                 fp32 alone. float64 works here too.
        bad: int32 (1), grows by the number of elements whose new value is not finite. These keep
            their old value: the test is on the fp32 value, before anything is written.
        start: flat index in W of the first element.
        precision: of the two products. "tf32" (rounds the factors to 10 bits; relative error of D about
            3e-4) is for GPUs; here it is refused.

    scale · D and the subtraction round separately.

    Example: parts = ([10., 10.],), the rest as in `dense_delta`, scale 2 → ([6., 6.],).
    """
    if precision != "fp32":
        raise ValueError(f"precision={precision!r}: the torch version has fp32 only")
    numel = parts[0].numel()
    for here, change in _delta_blocks(dA_QI, dB_CQ, A_QI, B_CQ, start, numel, second_order):
        shard_subtract_(tuple(part[here] for part in parts), change, bad, scale=scale)


def shard_subtract_(parts: tuple[Tensor, ...], D_N: Tensor, bad: Tensor, *, scale: float) -> None:
    """W ← W − scale · D for a delta that is already there (dense path); `parts`, `bad` as in `delta_apply_`.

    D may be bf16; scale · D is rounded to fp32 (or W's wider dtype), then subtracted.

    Example: parts = ([10., 10.],), D = [2, nan], scale 2 → ([6., 10.],), bad = [1].
    """
    if not D_N.numel():
        return
    split = parts[0].dtype == torch.bfloat16
    old = merge_fp32(parts[0], parts[1]) if split else parts[0]
    new = old - scale * D_N.to(old.dtype)
    # A CPU need not wait for the answer, and both ends (a NaN is both) take a third of the time of isfinite and where.
    if new.device.type != "cpu" or not all(end.isfinite() for end in new.aminmax()):
        finite = new.isfinite()
        bad += (~finite).sum().to(bad.dtype)
        new = torch.where(finite, new, old)
    if split:
        high, low = split_fp32(new)
        parts[0].copy_(high)
        parts[1].copy_(low)
    else:
        parts[0].copy_(new)
        if len(parts) > 1:
            parts[1].copy_(split_fp32(new)[0])


def _delta_blocks(
    dA_QI: Tensor, dB_CQ: Tensor, A_QI: Tensor, B_CQ: Tensor, start: int, numel: int, second_order: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Runs of the flat range with their D, whole rows computed at a time so that no O × I matrix is formed."""
    if not numel:
        return
    dtype = torch.promote_types(A_QI.dtype, torch.float32)
    A, dA = A_QI.to(dtype), dA_QI.to(dtype)
    base = A - dA if second_order else A
    cols = A.shape[1]
    offset = start % cols  # of the range within its first row
    rows = -(-(offset + numel) // cols)
    step = max(1, BLOCK_ELEMENTS // cols)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        change = torch.addmm(dB_CQ[first:last].to(dtype) @ base, B_CQ[first:last].to(dtype), dA).view(-1)
        begin = max(first * cols - offset, 0)
        end = min(last * cols - offset, numel)
        shift = first * cols - offset
        yield slice(begin, end), change[begin - shift : end - shift]
