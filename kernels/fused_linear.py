"""y = x Wᵀ + b and p = x Aᵀ from one reading of x; transposed views make it (dx, q) = (dy W, dy B).

    x (T × I)     W (O × I), any strides     A (R × I) fp32, rounded to x's dtype in registers     b (O)
    y (T × O), p (T × R) in x's dtype

A blocked matrix product whose first column of programs carries the thin product along: the x tile is in shared
memory anyway. What it saves is one reading of x; what it costs is cuBLAS's lead over Triton on the big product.
Off by default (`kernels.linear`): no row measured on a GPU shows yet that it wins. It is never chosen by timing at
run time: ranks and restarts could decide differently, and the two variants differ in the last bits.

Example: x = [[1, 2]], W = [[1, 0]], A = [[3, 4]], b = [5] → y = [[6]], p = [[11]].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .available import FUSED_MAX_R
from .common import FP32_DOT, POINTER, AotCase, block, dot, narrow, require, require_dtype, require_same_device

LARGE_SHARED = 200 * 1024  # bytes of shared memory that the widest tiles need
GROUP_T = 8  # blocks of tokens that share the same W tiles in the L2 cache


@triton.jit
def product_and_thin(
    x, W, A, bias, y, p,
    T, I, O, R,
    stride_xt, stride_xi, stride_wo, stride_wi, stride_ar, stride_ai, stride_yt, stride_pt,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of y; programs of the first block of columns also do that block of tokens of p."""
    blocks_t, blocks_o = tl.cdiv(T, BLOCK_T), tl.cdiv(O, BLOCK_O)
    group = tl.program_id(0) // (GROUP * blocks_o)
    in_group = tl.program_id(0) % (GROUP * blocks_o)
    height = min(blocks_t - group * GROUP, GROUP)
    block_t, block_o = group * GROUP + in_group % height, in_group // height
    t = block_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = block_o.to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    i, r = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_R)
    x_at = x + t[:, None] * stride_xt + i[None, :].to(tl.int64) * stride_xi
    W_at = W + o[None, :] * stride_wo + i[:, None].to(tl.int64) * stride_wi
    A_at = A + r[None, :].to(tl.int64) * stride_ar + i[:, None].to(tl.int64) * stride_ai
    of_T, of_O, of_R = t[:, None] < T, o[None, :] < O, r[None, :] < R
    total = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    if block_o == 0:
        thin = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        for first in range(0, I, BLOCK_I):
            here = i < I - first
            x_TI = tl.load(x_at, mask=of_T & here[None, :], other=0.0)
            W_IO = tl.load(W_at, mask=of_O & here[:, None], other=0.0)
            A_IR = tl.load(A_at, mask=of_R & here[:, None], other=0.0)
            total = dot(x_TI, W_IO, total, PRECISION)
            thin = dot(x_TI, narrow(A_IR, x_TI.dtype), thin, PRECISION)
            x_at += BLOCK_I * stride_xi
            W_at += BLOCK_I * stride_wi
            A_at += BLOCK_I * stride_ai
        tl.store(p + t[:, None] * stride_pt + r[None, :], narrow(thin, p.dtype.element_ty), mask=of_T & of_R)
    else:
        for first in range(0, I, BLOCK_I):
            here = i < I - first
            x_TI = tl.load(x_at, mask=of_T & here[None, :], other=0.0)
            W_IO = tl.load(W_at, mask=of_O & here[:, None], other=0.0)
            total = dot(x_TI, W_IO, total, PRECISION)
            x_at += BLOCK_I * stride_xi
            W_at += BLOCK_I * stride_wi
    if HAS_BIAS:
        total += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    tl.store(y + t[:, None] * stride_yt + o[None, :], narrow(total, y.dtype.element_ty), mask=of_T & of_O)


def _blocks(R: int, dtype: torch.dtype, chip: str) -> dict[str, int]:
    """Tiles that fit the chip's shared memory and registers: "sm_90", "sm_80" or "gfx942"."""
    block_r = block(R, most=FUSED_MAX_R)
    if dtype == torch.float32:
        how = {"BLOCK_T": 64, "BLOCK_O": 64, "BLOCK_I": 32, "num_warps": 8, "num_stages": 2}
    elif chip == "sm_90":
        how = {"BLOCK_T": 128, "BLOCK_O": 256, "BLOCK_I": 64, "num_warps": 8, "num_stages": 3}
    elif chip == "sm_80":
        how = {"BLOCK_T": 128, "BLOCK_O": 128, "BLOCK_I": 32, "num_warps": 8, "num_stages": 4}
    else:
        how = {"BLOCK_T": 128, "BLOCK_O": 128, "BLOCK_I": 32, "num_warps": 8, "num_stages": 2}
    return {**how, "BLOCK_R": block_r}


def _chip() -> str:
    if torch.version.hip:
        return "gfx942"
    if not torch.cuda.is_available():
        return "sm_80"
    # by memory, not by generation: later consumer chips have less than Hopper
    shared = torch.cuda.get_device_properties().shared_memory_per_block_optin  # type: ignore[attr-defined]
    return "sm_90" if shared >= LARGE_SHARED else "sm_80"


def fused_linear(x_TI: Tensor, W_OI: Tensor, A_RI: Tensor, bias_O: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Launches `product_and_thin`; any strides, R up to 64. See `reference.fused_linear`."""
    (tokens, features), (outputs, R) = x_TI.shape, (W_OI.shape[0], A_RI.shape[0])
    require(
        W_OI.shape[1] == A_RI.shape[1] == features,
        f"fused_linear: x has {features} features, W {W_OI.shape[1]}, A {A_RI.shape[1]}",
    )
    require(R <= FUSED_MAX_R, f"fused_linear: r is {R}, at most {FUSED_MAX_R}; use the separate products")
    require(bias_O is None or bias_O.is_contiguous(), "fused_linear: bias must be contiguous")
    require_dtype("fused_linear", x=x_TI, W=W_OI, bias=bias_O)
    require_dtype("fused_linear", A=A_RI)
    require_same_device("fused_linear", x_TI, W_OI, A_RI, bias_O)
    y_TO, p_TR = x_TI.new_empty(tokens, outputs), x_TI.new_empty(tokens, R)
    if not tokens:
        return y_TO, p_TR
    how = _blocks(R, x_TI.dtype, _chip())
    grid = (triton.cdiv(tokens, how["BLOCK_T"]) * triton.cdiv(outputs, how["BLOCK_O"]),)
    product_and_thin[grid](
        x_TI, W_OI, A_RI, bias_O, y_TO, p_TR, tokens, features, outputs, R,
        *x_TI.stride(), *W_OI.stride(), *A_RI.stride(), y_TO.stride(0), p_TR.stride(0),
        HAS_BIAS=bias_O is not None, PRECISION=FP32_DOT, GROUP=GROUP_T, **how,
    )  # fmt: skip
    return y_TO, p_TR


def _case(dtype: torch.dtype, R: int, chip: str, *, backward: bool) -> AotCase:
    how = _blocks(R, dtype, chip)
    warps, stages = how.pop("num_warps"), how.pop("num_stages")
    signature = {"x": POINTER[dtype], "W": POINTER[dtype], "A": POINTER[torch.float32]}
    signature |= dict.fromkeys(("y", "p"), POINTER[dtype])
    signature |= dict.fromkeys(("T", "I", "O", "R", "stride_xt", "stride_yt", "stride_pt"), "i32:16")
    signature |= dict.fromkeys(("stride_wi", "stride_ai") if backward else ("stride_wo", "stride_ar"), "i32:16")
    ones = dict.fromkeys(("stride_wo", "stride_ar") if backward else ("stride_wi", "stride_ai"), 1)
    fixed = {"bias": None, "HAS_BIAS": False, "PRECISION": FP32_DOT, "GROUP": GROUP_T, "stride_xi": 1}
    return AotCase(
        name=f"fused_linear {'backward ' if backward else ''}{str(dtype)[6:]} r{R}",
        kernel=product_and_thin,
        signature=signature,
        constexprs={**fixed, **ones, **how},
        num_warps=warps,
        num_stages=stages,
        tensor_core=True,
        targets=(chip,),
    )


AOT = [
    _case(dtype, R, chip, backward=backward)
    for chip in ("sm_80", "sm_90", "gfx942")
    for dtype, R, backward in (
        (torch.bfloat16, 16, False),
        (torch.bfloat16, 16, True),
        (torch.bfloat16, 64, False),
        (torch.float32, 16, False),
    )
]
