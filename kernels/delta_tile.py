"""A tile of D = ΔB (A − ΔA) + B ΔA, accurate to fp32, on the fp16 matrix units. Shared by two kernels.

    ΔA, A (Q × I)     ΔB, B (C × Q)     D (C × I)

Two launches. `split_factors` writes every factor as a power of two times a sum of two fp16 numbers,

    x = (high + low) · 2^−f          f per row of ΔB and B, per column of A − ΔA and ΔA,

where f brings the largest magnitude of that row or column to [2^14, 2^15), just under fp16's end. `high`
has 11 bits and `low` the next 11, so their sum misses x by 2^−23 of itself at most, down to elements 2^−15
of the largest; below, by at most 2^−39 of the largest. `delta_tile` then needs three products of fp16 matrices
(Ootomo & Yokota 2022, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32
theoretical peak performance"): half the matrix-unit time of 3 × TF32 or six bf16 products.

  - Matrix units truncate when they add, which biases long sums. Only one block of Q is summed in
    them, smallest products first; blocks are added on the ordinary cores, rounded to nearest.
  - low · low is at most 2^−22 of a product. With few terms that shows, so up to `LOW_LOW_Q` it is added.
  - Factors in bf16 have 8 bits: `high` is exact and all of `low` is left out, a third of the work with it.
  - One limb instead of two rounds the factors as TF32 does (10 bits behind the leading one), at twice its rate.
  - An element of D depends on its row of B, its column of A and the order of Q alone, not on the range asked
    for or on the tile: every division of W into shards gives the same bits.

Splitting first, not inside the product: there each program would repeat it for every tile that shares the
factor, and wait for the largest magnitude of each block. It costs a workspace as large as the factors.
Full accuracy holds for rows of ΔB and columns of A whose largest lies between 1e-30 and 1e30, and for rows of B and
columns of ΔA from 1e-14 on (in the scale of smaller ones D would leave fp32). Within a row, elements below 2^−15 of
its largest lose bits. They matter only where the other factor is as much larger there; even so the error is at
most Q · 2^−37 · (largest of the row of B) · (largest of the column of A), for either term.

Example: x = 3 alone in its row: f = 13, high = 24576, low = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import POINTER, AotCase, require, require_same_device

LOW_LOW_Q = 16
SPLIT_BLOCK, SPLIT_WARPS = 64, 4
FACTOR_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Tile:
    """Blocks of D (multiples of SPLIT_BLOCK) and of Q, and how a program runs them."""

    BC: int
    BI: int
    BK: int
    num_warps: int
    num_stages: int


MOST_ENTERED = tl.constexpr(48)  # largest f of B and ΔA: the first term is brought to their scale, times 2^(f + f)
GROUP = 8
# The one table of block sizes: in-place kernels must not be autotuned. Widest Q → tile, without a bound last.
# "wide" halves what is read of the factors per element, and fits the registers only where the matrix units
# read both operands from shared memory: Hopper. "ragged" is for ranges and rows that do not divide by 16, whose
# elements are read one by one, with a register for each one's place.
TILES = {
    "wide": {16: Tile(128, 128, 16, 8, 3), None: Tile(128, 128, 32, 8, 3)},
    "narrow": {16: Tile(64, 128, 16, 4, 3), None: Tile(64, 128, 32, 4, 3)},
    "ragged": {16: Tile(64, 64, 16, 4, 3), None: Tile(64, 64, 32, 4, 3)},
}
TARGETS = {"wide": ("sm_90",), "narrow": ("sm_80", "gfx942"), "ragged": ("sm_80", "sm_90", "gfx942")}


def width_for(device: torch.device, *divisible: int) -> str:
    """Which row of `TILES` a launch uses, given the numbers that ought to divide by 16."""
    if any(number % 16 for number in divisible):
        return "ragged"
    hopper = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9
    return "wide" if hopper else "narrow"


# --- splitting ------------------------------------------------------------------------------------------------


@triton.jit
def _power_of_two(exponent):
    """2^exponent in fp32, for normal numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _split_block(
    x, minus, limbs, scales, first, outer, outer_padded, Q, Q_padded,
    stride_xo, stride_xq, stride_mo, stride_mq, stride_lo, stride_lq, SHIFT: tl.constexpr,
    MINUS: tl.constexpr, ENTER: tl.constexpr, LIMBS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Splits BLOCK rows of B (or columns of A: see the strides) of x, or of x − minus; padding becomes zero."""
    o = (first + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    q = tl.arange(0, BLOCK_Q).to(tl.int64)[None, :]
    peak = tl.zeros((BLOCK,), dtype=tl.float32)
    for q0 in range(0, Q_padded, BLOCK_Q):
        inside = (o < outer) & (q0 + q < Q)
        values = _factor(x, minus, o, q0 + q, inside, stride_xo, stride_xq, stride_mo, stride_mq, MINUS)
        peak = tl.maximum(peak, tl.max(tl.abs(values), axis=1))
    # 14 + 127 less the biased exponent; the bound keeps 2^f and the factors in `scales` normal numbers. Where all is
    # zero any f would do, and 0 keeps the other term's sum in range.
    f = tl.minimum(141 - (peak.to(tl.int32, bitcast=True) >> 23), MOST_ENTERED if ENTER else 112)
    f = tl.where(peak == 0, 0, f)
    leave = scales + first + tl.arange(0, BLOCK)
    tl.store(leave, _power_of_two(SHIFT - f))
    if ENTER:
        tl.store(leave - outer_padded, _power_of_two(f - SHIFT))
    power = _power_of_two(f)[:, None]
    for q0 in range(0, Q_padded, BLOCK_Q):
        inside = (o < outer) & (q0 + q < Q)
        values = _factor(x, minus, o, q0 + q, inside, stride_xo, stride_xq, stride_mo, stride_mq, MINUS)
        values *= power
        high = values.to(tl.float16)
        at = limbs + o * stride_lo + (q0 + q) * stride_lq
        tl.store(at, high)
        if LIMBS == 2:
            tl.store(at + outer_padded.to(tl.int64) * Q_padded, (values - high.to(tl.float32)).to(tl.float16))


@triton.jit
def _factor(x, minus, o, q, inside, stride_xo, stride_xq, stride_mo, stride_mq, MINUS: tl.constexpr):
    values = tl.load(x + o * stride_xo + q * stride_xq, mask=inside, other=0.0).to(tl.float32)
    if MINUS:
        values -= tl.load(minus + o * stride_mo + q * stride_mq, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def split_factors(
    dA, dB, A, B, limbs_C, limbs_I, scales_C, scales_I,
    C, I, Q, C_padded, I_padded, Q_padded, stride_dA, stride_dB, stride_A, stride_B,
    SECOND_ORDER: tl.constexpr, DELTA_LIMBS: tl.constexpr, FACTOR_LIMBS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """limbs_C = [ΔB, B] (limb, C, Q), limbs_I = [A − ΔA, ΔA] (limb, Q, I); program axis 1 picks one of the four.

    `scales` holds 2^(−f−14) for rows and 2^(14−f) for columns: their product undoes both scalings, and a sum
    times the first alone stays far from both ends of fp32.
    """
    first = tl.program_id(0) * BLOCK
    which = tl.program_id(1)
    C_limb = C_padded.to(tl.int64) * Q_padded
    I_limb = I_padded.to(tl.int64) * Q_padded
    if first < C_padded:
        if which == 0:
            _split_block(
                dB, dB, limbs_C, scales_C, first, C, C_padded, Q, Q_padded,
                stride_dB, 1, 0, 0, Q_padded, 1, -14, False, False, DELTA_LIMBS, BLOCK, BLOCK_Q,
            )  # fmt: skip
        elif which == 1:
            _split_block(
                B, B, limbs_C + DELTA_LIMBS * C_limb, scales_C + 2 * C_padded, first, C, C_padded, Q, Q_padded,
                stride_B, 1, 0, 0, Q_padded, 1, -14, False, True, FACTOR_LIMBS, BLOCK, BLOCK_Q,
            )  # fmt: skip
    if first < I_padded:
        if which == 2:
            _split_block(
                A, dA, limbs_I, scales_I, first, I, I_padded, Q, Q_padded,
                1, stride_A, 1, stride_dA, 1, I_padded, 14, SECOND_ORDER, False, FACTOR_LIMBS, BLOCK, BLOCK_Q,
            )  # fmt: skip
        elif which == 3:
            _split_block(
                dA, dA, limbs_I + FACTOR_LIMBS * I_limb, scales_I + 2 * I_padded, first, I, I_padded, Q, Q_padded,
                1, stride_dA, 0, 0, 1, I_padded, 14, False, True, DELTA_LIMBS, BLOCK, BLOCK_Q,
            )  # fmt: skip


# --- the tile -------------------------------------------------------------------------------------------------


@triton.jit
def tile_position(rows, cols, BC: tl.constexpr, BI: tl.constexpr, GROUP: tl.constexpr):
    """(tile row, tile column) of this program: GROUP tile rows at a time, so that neighbours share limbs in L2."""
    program = tl.program_id(0)
    tiles_C, tiles_I = tl.cdiv(rows, BC), tl.cdiv(cols, BI)
    first = program // (GROUP * tiles_I) * GROUP
    height = tl.minimum(tiles_C - first, GROUP)
    within = program % (GROUP * tiles_I)
    return first + within % height, within // height


@triton.jit
def _add_term(
    D, left, right, left_limb, right_limb, I_padded, Q_padded,
    LEFT_LIMBS: tl.constexpr, RIGHT_LIMBS: tl.constexpr, LOW_LOW: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """D + left · right over all of Q, in the limbs' scale; one block of Q at a time is summed in the matrix units.

    The pointers are those of the tile's first row and column: 64 bits for where a tile begins, 32 within it.
    """
    c, i, k = tl.arange(0, D.shape[0]), tl.arange(0, D.shape[1]), tl.arange(0, BK)
    left_at = c[:, None] * Q_padded + k[None, :]
    right_at = k[:, None] * I_padded + i[None, :]
    for _ in range(0, Q_padded, BK):
        left_high, right_high = tl.load(left + left_at), tl.load(right + right_at)
        total = tl.zeros(D.shape, dtype=tl.float32)
        if LEFT_LIMBS == 2:
            left_low = tl.load(left + left_limb + left_at)
            if RIGHT_LIMBS == 2 and LOW_LOW:
                total = tl.dot(left_low, tl.load(right + right_limb + right_at), total)
            total = tl.dot(left_low, right_high, total)
        if RIGHT_LIMBS == 2:
            total = tl.dot(left_high, tl.load(right + right_limb + right_at), total)
        D += tl.dot(left_high, right_high, total)
        left += BK
        right += BK * I_padded
    return D


@triton.jit
def _rescale(D, scale_C, scale_I):
    return (
        D * tl.load(scale_C + tl.arange(0, D.shape[0]))[:, None] * tl.load(scale_I + tl.arange(0, D.shape[1]))[None, :]
    )


@triton.jit
def delta_tile(
    limbs_C, limbs_I, scales_C, scales_I, tile_c, tile_i, C_padded, I_padded, Q_padded,
    DELTA_LIMBS: tl.constexpr, FACTOR_LIMBS: tl.constexpr, LOW_LOW: tl.constexpr,
    BC: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The BC × BI tile of D, fp32, with no mask: the workspace is padded with zeros."""
    C_limb = C_padded.to(tl.int64) * Q_padded
    I_limb = I_padded.to(tl.int64) * Q_padded
    limbs_C += (tile_c * BC).to(tl.int64) * Q_padded
    limbs_I += tile_i * BI
    scales_C += tile_c * BC
    scales_I += tile_i * BI
    D = tl.zeros((BC, BI), dtype=tl.float32)
    D = _add_term(
        D, limbs_C, limbs_I, C_limb, I_limb, I_padded, Q_padded, DELTA_LIMBS, FACTOR_LIMBS, LOW_LOW, BK,
    )  # fmt: skip
    # one running sum for both terms: a second would not fit into the registers
    D = _rescale(D, scales_C, scales_I)
    D = _rescale(D, scales_C + C_padded, scales_I + I_padded)
    D = _add_term(
        D, limbs_C + DELTA_LIMBS * C_limb, limbs_I + FACTOR_LIMBS * I_limb, C_limb, I_limb, I_padded, Q_padded,
        FACTOR_LIMBS, DELTA_LIMBS, LOW_LOW, BK,
    )  # fmt: skip
    return _rescale(D, scales_C + 2 * C_padded, scales_I + 2 * I_padded)


@triton.jit
def range_index(tile_c, tile_i, cols, offset, numel, BC: tl.constexpr, BI: tl.constexpr, SHIFT: tl.constexpr):
    """An origin in the flat range (64 bits), each element's place from there (32), and whether it is in the range.

    The origin lies SHIFT elements before the tile. Another SHIFT gives the same places by an expression that the
    compiler does not recognise, and so does not keep in registers from one use to the next.
    """
    c = tl.arange(0, BC)[:, None]
    i = (SHIFT + tl.arange(0, BI))[None, :]
    first_i = tile_i * BI - SHIFT
    begin = (tile_c * BC).to(tl.int64) * cols + first_i - offset
    at = c * cols + i
    # both bounds fit 32 bits once they are cut to what a tile can reach
    least = tl.maximum(-begin, 0).to(tl.int32)
    most = tl.minimum(numel - begin, BC * cols + SHIFT).to(tl.int32)
    return begin, at, (i < cols - first_i) & (at >= least) & (at < most)


# --- launching ------------------------------------------------------------------------------------------------


# Triton types of the arguments that `delta_tile` and `range_index` add to a kernel.
DELTA_SIGNATURE = {
    **dict.fromkeys(("limbs_C", "limbs_I"), POINTER[torch.float16]),
    **dict.fromkeys(("scales_C", "scales_I"), POINTER[torch.float32]),
    **dict.fromkeys(("C_padded", "I_padded", "Q_padded"), "i32:16"),
    "rows": "i32",
    **dict.fromkeys(("cols", "offset", "numel"), "i32:16"),
}


def delta_signature(width: str, **targets: str) -> dict[str, str]:
    """`DELTA_SIGNATURE` and the tensors that the range's elements lie in, all as aligned as `width` asks for."""
    signature = {**targets, **DELTA_SIGNATURE}
    if width == "ragged":
        signature |= {n: signature[n].removesuffix(":16") for n in (*targets, "cols", "offset", "numel")}
    return signature


@dataclass(frozen=True)
class Factors:
    """The split factors of one range, and all that a launch of `delta_tile` needs."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]  # limbs_C, limbs_I, scales_C, scales_I
    sizes: tuple[int, int, int]  # C_padded, I_padded, Q_padded
    rows: int
    cols: int
    offset: int
    numel: int
    options: dict[str, int | bool]

    @property
    def arguments(self) -> tuple[Tensor | int, ...]:
        """From `limbs_C` to `numel`, as the kernels take them."""
        return *self.tensors, *self.sizes, self.rows, self.cols, self.offset, self.numel

    @property
    def grid(self) -> tuple[int]:
        tile = self.options
        return (triton.cdiv(self.rows, tile["BC"]) * triton.cdiv(self.cols, tile["BI"]),)


def launch_options(width: str, Q: int, delta_dtype: torch.dtype, precision: str) -> dict[str, int | bool]:
    """Constants and launch options of `delta_tile`: one source for the launchers and for ahead-of-time tests."""
    tile = next(tile for most, tile in TILES[width].items() if most is None or most >= Q)
    one = precision == "tf32"
    return {
        "DELTA_LIMBS": 1 if one or delta_dtype == torch.bfloat16 else 2,
        "FACTOR_LIMBS": 1 if one else 2,
        "LOW_LOW": Q <= LOW_LOW_Q,
        "BC": tile.BC,
        "BI": tile.BI,
        "BK": tile.BK,
        "GROUP": GROUP,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        # a contracted multiply-add would round scale · D and the subtraction once instead of twice
        "enable_fp_fusion": False,
    }


def check(name: str, dA_QI: Tensor, dB_CQ: Tensor, A_QI: Tensor, B_CQ: Tensor, start: int, numel: int) -> None:
    """Shapes, dtypes and strides of the factors of a flat range."""
    Q, cols = A_QI.shape
    rows = -(-(start % cols + numel) // cols)
    require(start >= 0, f"{name}: start is {start}")
    require(dA_QI.shape == A_QI.shape, f"{name}: dA is {tuple(dA_QI.shape)}, A {tuple(A_QI.shape)}")
    for label, factor in (("dB", dB_CQ), ("B", B_CQ)):
        found = tuple(factor.shape)
        require(found == (rows, Q), f"{name}: {label} is {found}, the range touches {rows} rows of {Q}")
    for label, factor in (("dA", dA_QI), ("dB", dB_CQ), ("A", A_QI), ("B", B_CQ)):
        require(factor.dtype in FACTOR_DTYPES, f"{name}: {label} is {factor.dtype}, must be fp32 or bf16")
        require(factor.stride(1) == 1 or factor.shape[1] == 1, f"{name}: {label}'s last dimension must be contiguous")
    require(dA_QI.dtype == dB_CQ.dtype, f"{name}: dA is {dA_QI.dtype}, dB {dB_CQ.dtype}")
    require_same_device(name, dA_QI, dB_CQ, A_QI, B_CQ)


def split(
    dA_QI: Tensor,
    dB_CQ: Tensor,
    A_QI: Tensor,
    B_CQ: Tensor,
    target: tuple[Tensor, ...],
    *,
    start: int,
    second_order: bool,
    precision: str = "fp32",
) -> Factors:
    """Launches `split_factors` into a fresh workspace, for a range of which `target` holds something per element."""
    (Q, cols), rows, numel = A_QI.shape, B_CQ.shape[0], target[0].numel()
    offset = start % cols
    width = width_for(A_QI.device, cols, offset, numel, *(tensor.data_ptr() for tensor in target))
    options = launch_options(width, Q, dA_QI.dtype, precision)
    C_padded = triton.cdiv(rows, options["BC"]) * options["BC"]
    I_padded = triton.cdiv(cols, options["BI"]) * options["BI"]
    Q_padded = triton.cdiv(Q, options["BK"]) * options["BK"]
    limbs = options["DELTA_LIMBS"] + options["FACTOR_LIMBS"]
    limbs_C = A_QI.new_empty(limbs, C_padded, Q_padded, dtype=torch.float16)
    limbs_I = A_QI.new_empty(limbs, Q_padded, I_padded, dtype=torch.float16)
    scales_C = A_QI.new_empty(3, C_padded, dtype=torch.float32)
    scales_I = A_QI.new_empty(3, I_padded, dtype=torch.float32)
    sizes = C_padded, I_padded, Q_padded
    split_factors[triton.cdiv(max(C_padded, I_padded), SPLIT_BLOCK), 4](
        dA_QI, dB_CQ, A_QI, B_CQ, limbs_C, limbs_I, scales_C, scales_I,
        rows, cols, Q, *sizes, dA_QI.stride(0), dB_CQ.stride(0), A_QI.stride(0), B_CQ.stride(0),
        SECOND_ORDER=second_order, DELTA_LIMBS=options["DELTA_LIMBS"], FACTOR_LIMBS=options["FACTOR_LIMBS"],
        BLOCK=SPLIT_BLOCK, BLOCK_Q=options["BK"], num_warps=SPLIT_WARPS,
    )  # fmt: skip
    return Factors((limbs_C, limbs_I, scales_C, scales_I), sizes, rows, cols, offset, numel, options)


def _split_case(delta_dtype: torch.dtype, Q: int) -> AotCase:
    options = launch_options("narrow", Q, delta_dtype, "fp32")
    pointers = {"dA": delta_dtype, "dB": delta_dtype, "A": torch.float32, "B": torch.float32}
    signature = {name: POINTER[dtype] for name, dtype in pointers.items()} | DELTA_SIGNATURE
    sizes = ("C", "I", "Q", "stride_dA", "stride_dB", "stride_A", "stride_B")
    return AotCase(
        name=f"split_factors delta {str(delta_dtype)[6:]} Q{Q}",
        kernel=split_factors,
        signature={n: t for n, t in signature.items() if n in split_factors.arg_names} | dict.fromkeys(sizes, "i32:16"),
        constexprs={n: options[n] for n in ("DELTA_LIMBS", "FACTOR_LIMBS")}
        | {"SECOND_ORDER": True, "BLOCK": SPLIT_BLOCK, "BLOCK_Q": options["BK"]},
        num_warps=SPLIT_WARPS,
        num_stages=3,
        tensor_core=False,
    )


SPLIT_AOT = [_split_case(dtype, Q) for dtype in (torch.bfloat16, torch.float32) for Q in (16, 128)]
