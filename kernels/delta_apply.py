"""W ← W − scale · D on a flat range of W, in one pass over W: 8 bytes per parameter.

    D = ΔB (A − ΔA) + B ΔA        ΔA, A (Q × I)     ΔB, B (C × Q)     W held as in `shard_subtract`

The product is `delta_tile`'s: accurate to fp32 (precision "fp32") or with factors rounded to 10 bits ("tf32").
D never reaches memory. What is written is bitwise old − scale · D with the fp32 D of `dense_delta`.

Example: W = [10, 10], A = [[1, 2]], B = [[3]], ΔA = [[0.5, 0]], ΔB = [[1]], start 0, scale 2 → W = [6, 6].
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import AotCase, require, require_same_device
from .delta_tile import (
    SPLIT_AOT,
    TARGETS,
    check,
    delta_signature,
    delta_tile,
    launch_options,
    range_index,
    split,
    tile_position,
)
from .shard_subtract import POINTERS, as_integers, read_shard, subtract, write_shard

PRECISIONS = ("fp32", "tf32")


@triton.jit
def subtract_delta(
    first, second, bad, limbs_C, limbs_I, scales_C, scales_I, C_padded, I_padded, Q_padded,
    rows, cols, offset, numel, scale, FORMAT: tl.constexpr,
    DELTA_LIMBS: tl.constexpr, FACTOR_LIMBS: tl.constexpr, LOW_LOW: tl.constexpr,
    BC: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of the range."""
    tile_c, tile_i = tile_position(rows, cols, BC, BI, GROUP)
    # W is read before the product, which hides the time that this takes; where it lies is computed again
    # afterwards, because registers are scarce meanwhile
    begin, at, inside = range_index(tile_c, tile_i, cols, offset, numel, BC, BI, 0)
    stored, low = read_shard(first + begin, second + begin, at, inside, FORMAT)
    D = delta_tile(
        limbs_C, limbs_I, scales_C, scales_I, tile_c, tile_i, C_padded, I_padded, Q_padded,
        DELTA_LIMBS, FACTOR_LIMBS, LOW_LOW, BC, BI, BK,
    )  # fmt: skip
    bits, lost = subtract(stored, low, D, scale, FORMAT)
    begin, at, inside = range_index(tile_c, tile_i, cols, offset, numel, BC, BI, BI)
    write_shard(first + begin, second + begin, at, inside, bits, FORMAT)
    if tl.max(lost.to(tl.int32)) > 0:
        tl.atomic_add(bad, tl.sum((lost & inside).to(tl.int32)))


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
    """Launches `subtract_delta`. See `reference.delta_apply_`."""
    require(precision in PRECISIONS, f"delta_apply_: precision={precision!r}, must be one of {PRECISIONS}")
    first, second, form = as_integers("delta_apply_", parts, bad)
    numel = first.numel()
    check("delta_apply_", dA_QI, dB_CQ, A_QI, B_CQ, start, numel)
    require_same_device("delta_apply_", first, A_QI)
    if not numel:
        return
    factors = split(
        dA_QI, dB_CQ, A_QI, B_CQ, parts, start=start, second_order=second_order, precision=precision
    )  # fmt: skip
    subtract_delta[factors.grid](first, second, bad, *factors.arguments, scale, FORMAT=form, **factors.options)


def _case(width: str, form: str, delta_dtype: torch.dtype, Q: int, precision: str = "fp32") -> AotCase:
    options = launch_options(width, Q, delta_dtype, precision)
    warps, stages, fusion = (options.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion"))
    first, second = POINTERS[form]
    return AotCase(
        name=f"delta_apply {width} {form} delta {str(delta_dtype)[6:]} Q{Q} {precision}",
        kernel=subtract_delta,
        signature={"bad": "*i32", "scale": "fp32", **delta_signature(width, first=first, second=second)},
        constexprs={"FORMAT": form, **options},
        num_warps=warps,
        num_stages=stages,
        tensor_core=True,
        options={"enable_fp_fusion": fusion},
        targets=TARGETS[width],
    )


AOT = [
    *SPLIT_AOT,
    *(_case(width, "split", torch.float32, Q) for width in TARGETS for Q in (16, 128)),
    *(_case(width, form, torch.float32, 128) for width in TARGETS for form in ("master_half", "master")),
    *(_case(width, "split", torch.bfloat16, 128) for width in ("wide", "narrow")),
    *(_case(width, "split", torch.float32, 128, "tf32") for width in ("wide", "narrow")),
]
