"""q = dy B and grad B += dyᵀ p  (what the slice needs of dy), both from one reading of dy.

    dy (T × O)     p (T × R)     B (O × R) fp32, rounded to dy's dtype in registers
    q (T × R) in dy's dtype      grad B (O × R) fp32, added to

q sums over features and grad B over tokens, so no cut of dy suits both. Each program takes a block of features
and a run of tokens, and leaves fp32 partial sums of either, which a second pass adds in a fixed order (no atomics).
For R = 16 the sums of q are an eighth of dy's bytes, for R = 32 a quarter; beyond that they would cost what a second
reading of dy costs, and dy is read twice instead.

Example: dy = [[2]], p = [[11]], B = [[5]], grad B = [[1]] → q = [[10]], grad B = [[23]].
"""

from __future__ import annotations

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
    narrow,
    require,
    require_contiguous,
    require_dtype,
    require_same_device,
    sum_partials_,
)
from .low_rank_forward import low_rank_forward
from .low_rank_grad_A import partial_products, split_tokens

# Up to which r one pass pays and its accumulators fit into registers.
ONE_PASS_R = {torch.bfloat16: 32, torch.float32: 16}


@triton.jit
def one_pass(
    dy, p, B, q_partial, B_partial,
    T, O, R, run,
    stride_yt, stride_yo, stride_pt, stride_bo,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """q_partial[j, t, r] = Σ_o dy[t, o] B[o, r] over the block j of features, for the tokens of run s;
    B_partial[s, o, r] = Σ_t dy[t, o] p[t, r] over the tokens of run s, for the features of block j."""
    j, s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o = j * BLOCK_O + tl.arange(0, BLOCK_O)
    r = tl.arange(0, BLOCK_R)
    t = tl.arange(0, BLOCK_T)
    of_O, of_R = o < O, r < R
    B_OR = tl.load(B + o[:, None] * stride_bo + r[None, :], mask=of_O[:, None] & of_R[None, :], other=0.0)
    B_OR = narrow(B_OR, dy.dtype.element_ty)
    start = s * run
    dy_at = dy + (start + t[:, None]) * stride_yt + o[None, :] * stride_yo
    p_at = p + (start + t[:, None]) * stride_pt + r[None, :]
    q_at = q_partial + (j * T + start + t[:, None]) * R + r[None, :]
    grad = tl.zeros((BLOCK_O, BLOCK_R), dtype=tl.float32)
    zero = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for first in range(0, run, BLOCK_T):
        here = start + first + t < T  # runs are whole blocks of tokens
        dy_TO = tl.load(dy_at, mask=here[:, None] & of_O[None, :], other=0.0)
        p_TR = tl.load(p_at, mask=here[:, None] & of_R[None, :], other=0.0)
        q_TR = dot(dy_TO, B_OR, zero, PRECISION)
        grad = dot(tl.trans(dy_TO), p_TR, grad, PRECISION)
        tl.store(q_at, q_TR, mask=here[:, None] & of_R[None, :])
        dy_at += BLOCK_T * stride_yt
        p_at += BLOCK_T * stride_pt
        q_at += BLOCK_T * R
    at = B_partial + (s * O + o[:, None]) * R + r[None, :]
    tl.store(at, grad, mask=of_O[:, None] & of_R[None, :])


def _blocks(R: int, dtype: torch.dtype, *, amd: bool) -> dict[str, int]:
    """The wider the block of features, the fewer partial sums of q; registers bound it."""
    block_r = block(R, most=ONE_PASS_R[dtype])
    if dtype == torch.float32:
        return {"BLOCK_T": 32, "BLOCK_O": 64, "BLOCK_R": block_r, "num_warps": 4, "num_stages": 2}
    wide = 256 if not amd else 128 if block_r <= 16 else 64
    return {"BLOCK_T": 64, "BLOCK_O": wide, "BLOCK_R": block_r, "num_warps": 8, "num_stages": 3}


def _check(grad_B_OR: Tensor, dy_TO: Tensor, p_TR: Tensor, B_OR: Tensor) -> None:
    (tokens, features), R = dy_TO.shape, B_OR.shape[1]
    require(B_OR.shape == grad_B_OR.shape == (features, R), f"low_rank_grad_B_: grad B is {tuple(grad_B_OR.shape)}")
    require(p_TR.shape == (tokens, R), f"low_rank_grad_B_: p is {tuple(p_TR.shape)}, must be {(tokens, R)}")
    require(grad_B_OR.dtype == torch.float32, f"low_rank_grad_B_: grad B is {grad_B_OR.dtype}, must be float32")
    require_dtype("low_rank_grad_B_", dy=dy_TO, p=p_TR)
    require_dtype("low_rank_grad_B_", B=B_OR)
    require_same_device("low_rank_grad_B_", grad_B_OR, dy_TO, p_TR, B_OR)
    require_contiguous("low_rank_grad_B_", grad_B=grad_B_OR, B=B_OR)


def low_rank_grad_B_(
    grad_B_OR: Tensor, dy_TO: Tensor, p_TR: Tensor, B_OR: Tensor, q_TR: Tensor | None = None
) -> Tensor:
    """Launches `one_pass`, or only the half that is left when q is given; see `reference.low_rank_grad_B_`."""
    _check(grad_B_OR, dy_TO, p_TR, B_OR)
    (tokens, features), R = dy_TO.shape, B_OR.shape[1]
    if not dy_TO.numel():
        return dy_TO.new_zeros(tokens, R)
    if q_TR is not None or ONE_PASS_R[dy_TO.dtype] < R:
        sum_partials_(partial_products(p_TR, dy_TO, transposed=True), grad_B_OR, add=True)
        return low_rank_forward(dy_TO, B_OR.t()) if q_TR is None else q_TR
    if p_TR.stride(1) != 1:
        p_TR = p_TR.contiguous()
    how = _blocks(R, dy_TO.dtype, amd=torch.version.hip is not None)
    blocks = triton.cdiv(features, how["BLOCK_O"])
    run, runs = split_tokens(tokens, blocks, how["BLOCK_T"], dy_TO.device)
    q_partial = torch.empty(blocks, tokens, R, dtype=torch.float32, device=dy_TO.device)
    B_partial = torch.empty(runs, features, R, dtype=torch.float32, device=dy_TO.device)
    one_pass[(blocks, runs)](
        dy_TO, p_TR, B_OR, q_partial, B_partial, tokens, features, R, run,
        *dy_TO.stride(), p_TR.stride(0), B_OR.stride(0), PRECISION=FP32_DOT, **how,
    )  # fmt: skip
    sum_partials_(B_partial, grad_B_OR, add=True)
    q_TR = dy_TO.new_empty(tokens, R)
    sum_partials_(q_partial, q_TR, add=False)
    return q_TR


def _case(dtype: torch.dtype, R: int, *, amd: bool) -> AotCase:
    how = _blocks(R, dtype, amd=amd)
    warps, stages = how.pop("num_warps"), how.pop("num_stages")
    signature = {"dy": POINTER[dtype], "p": POINTER[dtype], "B": POINTER[torch.float32]}
    signature |= dict.fromkeys(("q_partial", "B_partial"), POINTER[torch.float32])
    signature |= dict.fromkeys(("T", "O", "R", "run", "stride_yt", "stride_pt", "stride_bo"), "i32:16")
    return AotCase(
        name=f"low_rank_grad_B {str(dtype)[6:]} r{R}",
        kernel=one_pass,
        signature=signature,
        constexprs={"PRECISION": FP32_DOT, "stride_yo": 1, **how},
        num_warps=warps,
        num_stages=stages,
        tensor_core=True,
        targets=("gfx942",) if amd else ("sm_80", "sm_90"),
    )


AOT = [
    _case(dtype, R, amd=amd)
    for amd in (False, True)
    for dtype, R in ((torch.bfloat16, 16), (torch.bfloat16, 32), (torch.float32, 16))
]
