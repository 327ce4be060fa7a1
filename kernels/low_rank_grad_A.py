"""grad A += qᵀ x, what x owes the slice: one reading of x, for one Linear or for all that share x.

    q (T × R)     x (T × I)     grad A (R × I) fp32, added to

The tokens are cut into as many runs as it takes to fill the chip; each leaves an fp32 partial sum, and a second pass
adds these in a fixed order, so that the result is the same every time (no atomics).

Example: q = [[10]], x = [[1, 2]], grad A = [[1, 1]] → grad A = [[11, 21]].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    FP32_DOT,
    POINTER,
    AotCase,
    block,
    dot,
    multiprocessors,
    require,
    require_contiguous,
    require_dtype,
    require_same_device,
    sum_partials_,
)

MOST_R = 64


@triton.jit
def outer_product(
    q, x, partial,
    T, I, R, run,
    stride_qt, stride_xt, stride_xi, stride_pi, stride_pr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """partial[s, i, r] = Σ_t x[t, i] q[t, r] over the tokens of run s, for one block of features and one of r."""
    # r runs fastest: programs that read the same x start together, and the later ones find it in the L2 cache
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    s = tl.program_id(2).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    start = s * run
    x_at = x + (start + t[:, None]) * stride_xt + i[None, :].to(tl.int64) * stride_xi
    q_at = q + (start + t[:, None]) * stride_qt + r[None, :]
    total = tl.zeros((BLOCK_I, BLOCK_R), dtype=tl.float32)
    for first in range(0, run, BLOCK_T):
        here = start + first + t < T  # runs are whole blocks of tokens
        x_TI = tl.load(x_at, mask=here[:, None] & (i[None, :] < I), other=0.0)
        q_TR = tl.load(q_at, mask=here[:, None] & (r[None, :] < R), other=0.0)
        total = dot(tl.trans(x_TI), q_TR, total, PRECISION)
        x_at += BLOCK_T * stride_xt
        q_at += BLOCK_T * stride_qt
    at = partial + s * I * R + i[:, None].to(tl.int64) * stride_pi + r[None, :].to(tl.int64) * stride_pr
    tl.store(at, total, mask=(i[:, None] < I) & (r[None, :] < R))


def _blocks(R: int, dtype: torch.dtype) -> dict[str, int]:
    block_r = block(R, most=MOST_R)
    if dtype == torch.float32:
        return {"BLOCK_T": 32, "BLOCK_I": 64, "BLOCK_R": block_r, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_T": 64, "BLOCK_I": 128, "BLOCK_R": block_r, "num_warps": 4, "num_stages": 3}


def split_tokens(tokens: int, programs: int, block_t: int, device: torch.device) -> tuple[int, int]:
    """(tokens of a run, number of runs): two programs for every multiprocessor, but no run shorter than a block."""
    runs = max(1, min(2 * multiprocessors(device) // programs, triton.cdiv(tokens, block_t)))
    run = triton.cdiv(triton.cdiv(tokens, runs), block_t) * block_t
    return run, triton.cdiv(tokens, run)


def partial_products(thin_TR: Tensor, wide_TN: Tensor, *, transposed: bool) -> Tensor:
    """Partial sums of thinᵀ wide (runs × R × N), or of its transpose (runs × N × R); fp32."""
    (tokens, features), R = wide_TN.shape, thin_TR.shape[1]
    if thin_TR.stride(1) != 1:
        thin_TR = thin_TR.contiguous()
    how = _blocks(R, wide_TN.dtype)
    programs = triton.cdiv(features, how["BLOCK_I"]), triton.cdiv(R, how["BLOCK_R"])
    run, runs = split_tokens(tokens, programs[0] * programs[1], how["BLOCK_T"], wide_TN.device)
    shape = (features, R) if transposed else (R, features)
    partial = torch.empty(runs, *shape, dtype=torch.float32, device=wide_TN.device)
    strides = (R, 1) if transposed else (1, features)
    outer_product[(programs[1], programs[0], runs)](
        thin_TR, wide_TN, partial, tokens, features, R, run, thin_TR.stride(0), *wide_TN.stride(), *strides,
        PRECISION=FP32_DOT, **how,
    )  # fmt: skip
    return partial


def low_rank_grad_A_(grad_As: Sequence[Tensor], qs: Sequence[Tensor], x_TI: Tensor) -> None:
    """Launches `outer_product`; x of any strides. See `reference.low_rank_grad_A_`."""
    require(len(grad_As) == len(qs), f"low_rank_grad_A_: {len(grad_As)} gradients for {len(qs)} q")
    for grad, q in zip(grad_As, qs, strict=True):
        require(grad.shape == (q.shape[1], x_TI.shape[1]), f"low_rank_grad_A_: grad A is {tuple(grad.shape)}")
        require(grad.dtype == torch.float32, f"low_rank_grad_A_: grad A is {grad.dtype}, must be float32")
        require(q.shape[0] == x_TI.shape[0], f"low_rank_grad_A_: q has {q.shape[0]} tokens, x {x_TI.shape[0]}")
        require_dtype("low_rank_grad_A_", q=q, x=x_TI)
        require_same_device("low_rank_grad_A_", grad, q, x_TI)
        require_contiguous("low_rank_grad_A_", grad_A=grad)
    if not x_TI.numel():
        return
    q_TR = qs[0] if len(qs) == 1 else torch.cat(list(qs), dim=1)
    partial = partial_products(q_TR, x_TI, transposed=False)
    for grad, part in zip(grad_As, partial.split([q.shape[1] for q in qs], dim=1), strict=True):
        sum_partials_(part, grad, add=True)


def _case(dtype: torch.dtype, R: int, transposed: bool) -> AotCase:
    how = _blocks(R, dtype)
    warps, stages = how.pop("num_warps"), how.pop("num_stages")
    signature = {"q": POINTER[dtype], "x": POINTER[dtype], "partial": POINTER[torch.float32]}
    signature |= dict.fromkeys(("T", "I", "R", "run", "stride_qt", "stride_xt"), "i32:16")
    signature["stride_pi" if transposed else "stride_pr"] = "i32:16"
    ones = {"stride_xi": 1, "stride_pr" if transposed else "stride_pi": 1}
    return AotCase(
        name=f"low_rank_grad_A {str(dtype)[6:]} r{R}{' transposed' if transposed else ''}",
        kernel=outer_product,
        signature=signature,
        constexprs={"PRECISION": FP32_DOT, **ones, **how},
        num_warps=warps,
        num_stages=stages,
        tensor_core=True,
    )


AOT = [
    _case(dtype, R, transposed)
    for dtype in (torch.bfloat16, torch.float32)
    for R, transposed in ((16, False), (64, False), (64, True))
]
