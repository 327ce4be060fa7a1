"""p = x Aᵀ, what a slice needs of the forward pass: one reading of x besides the layer's own product.

    x (T × I) bf16 or fp32     A (R × I) fp32, rounded to x's dtype in registers     p (T × R) in x's dtype

Each program takes some tokens and walks along their features, so x is read once for R up to 256. Thin
products are bound by that reading, hence small token blocks where there are few tokens: enough programs to
fill the chip.

Example: x = [[1, 2]], A = [[3, 4]] → p = [[11]].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FP32_DOT, POINTER, AotCase, block, dot, narrow, require, require_dtype, require_same_device

MOST_R = 256


@triton.jit
def thin_product(
    x, A, p,
    T, I, R,
    stride_xt, stride_xi, stride_ar, stride_ai, stride_pt,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """p[t, r] = Σ_i x[t, i] A[r, i] for one block of tokens and one of r."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    i = tl.arange(0, BLOCK_I)
    x_at = x + t[:, None] * stride_xt + i[None, :].to(tl.int64) * stride_xi
    A_at = A + r[None, :].to(tl.int64) * stride_ar + i[:, None].to(tl.int64) * stride_ai
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for first in range(0, I, BLOCK_I):
        here = i < I - first
        x_TI = tl.load(x_at, mask=(t[:, None] < T) & here[None, :], other=0.0)
        A_IR = tl.load(A_at, mask=(r[None, :] < R) & here[:, None], other=0.0)
        total = dot(x_TI, narrow(A_IR, x_TI.dtype), total, PRECISION)
        x_at += BLOCK_I * stride_xi
        A_at += BLOCK_I * stride_ai
    p_at = p + t[:, None] * stride_pt + r[None, :]
    tl.store(p_at, narrow(total, p.dtype.element_ty), mask=(t[:, None] < T) & (r[None, :] < R))


def _blocks(tokens: int, R: int, dtype: torch.dtype, *, amd: bool) -> dict[str, int]:
    """Block sizes: the token block shrinks with the number of tokens, the warps grow with the block of r.

    AMD's chips have 64 KiB of shared memory for what NVIDIA's have 160 and more, and need no deep pipeline.
    """
    block_t, block_r = (64 if tokens >= 8192 else 32 if tokens >= 4096 else 16), block(R, most=MOST_R)
    if dtype == torch.float32:  # three bf16 parts of both operands live in registers
        block_t, block_i, stages = min(block_t, 32), 32, 2
    else:
        block_i, stages = (128, 3) if block_r <= 64 else (64, 2)
    if amd:
        block_i, stages = min(block_i, 64 if block_r <= 64 else 32), 2
    warps = 4 if block_r <= 64 else 8
    return {"BLOCK_T": block_t, "BLOCK_I": block_i, "BLOCK_R": block_r, "num_warps": warps, "num_stages": stages}


def low_rank_forward(x_TI: Tensor, A_RI: Tensor) -> Tensor:
    """Launches `thin_product`; any strides. See `reference.low_rank_forward`."""
    (tokens, features), R = x_TI.shape, A_RI.shape[0]
    require(A_RI.shape[1] == features, f"low_rank_forward: x has {features} features, A {A_RI.shape[1]}")
    require_dtype("low_rank_forward", x=x_TI)
    require_dtype("low_rank_forward", A=A_RI)
    require_same_device("low_rank_forward", x_TI, A_RI)
    p_TR = x_TI.new_empty(tokens, R)
    if not p_TR.numel():
        return p_TR
    how = _blocks(tokens, R, x_TI.dtype, amd=torch.version.hip is not None)
    grid = triton.cdiv(tokens, how["BLOCK_T"]), triton.cdiv(R, how["BLOCK_R"])
    thin_product[grid](
        x_TI, A_RI, p_TR, tokens, features, R, *x_TI.stride(), *A_RI.stride(), p_TR.stride(0),
        PRECISION=FP32_DOT, **how,
    )  # fmt: skip
    return p_TR


def _case(dtype: torch.dtype, tokens: int, R: int, *, amd: bool) -> AotCase:
    how = _blocks(tokens, R, dtype, amd=amd)
    warps, stages = how.pop("num_warps"), how.pop("num_stages")
    signature = {"x": POINTER[dtype], "A": POINTER[torch.float32], "p": POINTER[dtype]}
    signature |= dict.fromkeys(("T", "I", "R", "stride_xt", "stride_ar", "stride_pt"), "i32:16")
    return AotCase(
        name=f"low_rank_forward {str(dtype)[6:]} T{tokens} r{R}",
        kernel=thin_product,
        signature=signature,
        constexprs={"PRECISION": FP32_DOT, "stride_xi": 1, "stride_ai": 1, **how},
        num_warps=warps,
        num_stages=stages,
        tensor_core=True,
        targets=("gfx942",) if amd else ("sm_80", "sm_90"),
    )


AOT = [
    _case(dtype, *size, amd=amd)
    for amd in (False, True)
    for dtype in (torch.bfloat16, torch.float32)
    for size in ((2048, 16), (8192, 16), (8192, 64), (8192, 256))
]
