"""The change of W on a flat range of its elements, written tile by tile.

    D = ΔB (A − ΔA) + B ΔA        ΔA, A (Q × I)     ΔB, B (C × Q)     D (numel) fp32 or bf16

The product is `delta_tile`'s, the same that `delta_apply` subtracts, bit for bit. Each element is written once;
no C × I matrix exists besides the result.

Example: A = [[1, 2]], B = [[3]], ΔA = [[0.5, 0]], ΔB = [[1]], start 0, numel 2
→ D = [2, 2] (first order [2.5, 2]); start 1, numel 1 → [2].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import POINTER, AotCase, narrow, require
from .delta_tile import TARGETS, check, delta_signature, delta_tile, launch_options, range_index, split, tile_position

OUTPUT_DTYPES = (torch.float32, torch.bfloat16)


@triton.jit
def write_delta(
    out, limbs_C, limbs_I, scales_C, scales_I, C_padded, I_padded, Q_padded, rows, cols, offset, numel,
    DELTA_LIMBS: tl.constexpr, FACTOR_LIMBS: tl.constexpr, LOW_LOW: tl.constexpr,
    BC: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[at] = D for the elements of one tile that lie in the range."""
    tile_c, tile_i = tile_position(rows, cols, BC, BI, GROUP)
    D = delta_tile(
        limbs_C, limbs_I, scales_C, scales_I, tile_c, tile_i, C_padded, I_padded, Q_padded,
        DELTA_LIMBS, FACTOR_LIMBS, LOW_LOW, BC, BI, BK,
    )  # fmt: skip
    begin, at, inside = range_index(tile_c, tile_i, cols, offset, numel, BC, BI, 0)
    tl.store(out + begin + at, narrow(D, out.dtype.element_ty), mask=inside)


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
    """Launches `write_delta`. See `reference.dense_delta`."""
    check("dense_delta", dA_QI, dB_CQ, A_QI, B_CQ, start, numel)
    require(dtype in OUTPUT_DTYPES, f"dense_delta: dtype is {dtype}, must be fp32 or bf16")
    result = A_QI.new_empty(numel, dtype=dtype)
    if not numel:
        return result
    factors = split(dA_QI, dB_CQ, A_QI, B_CQ, (result,), start=start, second_order=second_order)
    write_delta[factors.grid](result, *factors.arguments, **factors.options)
    return result


def _case(width: str, dtype: torch.dtype, delta_dtype: torch.dtype, Q: int) -> AotCase:
    options = launch_options(width, Q, delta_dtype, "fp32")
    warps, stages, fusion = (options.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion"))
    return AotCase(
        name=f"dense_delta {width} {str(dtype)[6:]} delta {str(delta_dtype)[6:]} Q{Q}",
        kernel=write_delta,
        signature=delta_signature(width, out=POINTER[dtype]),
        constexprs=options,
        num_warps=warps,
        num_stages=stages,
        tensor_core=True,
        options={"enable_fp_fusion": fusion},
        targets=TARGETS[width],
    )


AOT = [
    _case(width, *case)
    for width in TARGETS
    for case in (
        (torch.float32, torch.float32, 16),
        (torch.float32, torch.float32, 128),
        (torch.bfloat16, torch.bfloat16, 128),
    )
]
