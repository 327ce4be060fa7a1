"""W ← W − scale · D on a flat shard, for a delta that is already there; and how a shard's elements are written.

    W held as  (high bf16, low int16)   bits(w) = (bits(high) << 16) + low, see `reference.split_fp32`
               (w fp32, half bf16)      the half is w rounded, ties up
               (w fp32,)
    D (N) fp32 or bf16        bad (1) int32

One pass: 8 bytes of W and 2 or 4 of D per element. The product and the difference round separately, as
in torch. An element whose new fp32 value is not finite keeps its old one and is counted; the test is on the fp32
value because its bf16 half can hide a NaN.

Example: W = [10, 10], D = [2, nan], scale 2 → W = [6, 10], bad = [1].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import POINTER, AotCase, require, require_contiguous, require_same_device

FORMATS = {
    (torch.bfloat16, torch.int16): "split",
    (torch.float32, torch.bfloat16): "master_half",
    (torch.float32,): "master",
}
# Triton types of the two tensors, each as integers of its width; the second is the first again where there is one.
POINTERS = {
    "split": ("*i16:16", "*i16:16"),
    "master_half": ("*i32:16", "*i16:16"),
    "master": ("*i32:16", "*i32:16"),
}
BLOCK, WARPS = 2048, 8


@triton.jit
def read_shard(first, second, at, inside, FORMAT: tl.constexpr):
    """What the shard holds at these places, as it is held; both values are the same where W is one tensor."""
    stored = tl.load(first + at, mask=inside, other=0, eviction_policy="evict_first")
    if FORMAT == "split":
        return stored, tl.load(second + at, mask=inside, other=0, eviction_policy="evict_first")
    else:
        return stored, stored


@triton.jit
def subtract(stored, low, D, scale, FORMAT: tl.constexpr):
    """bits of old − scale · D where that is finite and of the old value elsewhere; and where it is not finite."""
    if FORMAT == "split":
        old = ((stored.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        old = stored.to(tl.float32, bitcast=True)
    new = old - scale * D
    lost = (new.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000
    return tl.where(lost, old, new).to(tl.int32, bitcast=True), lost


@triton.jit
def write_shard(first, second, at, inside, bits, FORMAT: tl.constexpr):
    """Writes fp32 values, given as integers, in the shard's format."""
    # the half, ties up: see `reference.split_fp32` for why not to even
    high = (bits + 0x8000) >> 16
    if FORMAT == "split":
        tl.store(first + at, high.to(tl.int16), mask=inside)
        tl.store(second + at, (bits - (high << 16)).to(tl.int16), mask=inside)
    else:
        tl.store(first + at, bits, mask=inside)
        if FORMAT == "master_half":
            tl.store(second + at, high.to(tl.int16), mask=inside)


@triton.jit
def subtract_shard(first, second, bad, D, numel, scale, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    """One block of the flat shard."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    change = tl.load(D + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    stored, low = read_shard(first, second, at, inside, FORMAT)
    bits, lost = subtract(stored, low, change, scale, FORMAT)
    write_shard(first, second, at, inside, bits, FORMAT)
    count = tl.sum((lost & inside).to(tl.int32))
    if count > 0:
        tl.atomic_add(bad, count)


def as_integers(name: str, parts: tuple[Tensor, ...], bad: Tensor) -> tuple[Tensor, Tensor, str]:
    """Checks the shard; returns its one or two tensors as integers of their width, and the name of its format."""
    dtypes = tuple(part.dtype for part in parts)
    require(dtypes in FORMATS, f"{name}: parts are {dtypes}, must be one of {list(FORMATS)}")
    require(bad.dtype == torch.int32 and bad.numel() == 1, f"{name}: bad must be one int32")
    require(all(part.shape == parts[0].shape for part in parts), f"{name}: parts differ in shape")
    require_contiguous(name, **{f"parts[{n}]": part for n, part in enumerate(parts)})
    require_same_device(name, *parts, bad)
    width = {torch.bfloat16: torch.int16, torch.int16: torch.int16, torch.float32: torch.int32}
    whole = [part.view(width[part.dtype]) for part in parts]
    return whole[0], whole[-1], FORMATS[dtypes]


def shard_subtract_(parts: tuple[Tensor, ...], D_N: Tensor, bad: Tensor, *, scale: float) -> None:
    """Launches `subtract_shard`. See `reference.shard_subtract_`."""
    first, second, form = as_integers("shard_subtract_", parts, bad)
    numel = first.numel()
    require(D_N.numel() == numel, f"shard_subtract_: D has {D_N.numel()} elements, the shard {numel}")
    require(D_N.dtype in (torch.float32, torch.bfloat16), f"shard_subtract_: D is {D_N.dtype}, must be fp32 or bf16")
    require_contiguous("shard_subtract_", D=D_N)
    require_same_device("shard_subtract_", first, D_N)
    if not numel:
        return
    subtract_shard[(triton.cdiv(numel, BLOCK),)](
        first, second, bad, D_N, numel, scale,
        FORMAT=form, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def _case(form: str, dtype: torch.dtype) -> AotCase:
    first, second = POINTERS[form]
    return AotCase(
        name=f"shard_subtract {form} delta {str(dtype)[6:]}",
        kernel=subtract_shard,
        signature={
            "first": first, "second": second, "bad": "*i32:16", "D": POINTER[dtype], "numel": "i32:16", "scale": "fp32"
        },
        constexprs={"FORMAT": form, "BLOCK": BLOCK},
        num_warps=WARPS,
        num_stages=3,
        tensor_core=False,
        options={"enable_fp_fusion": False},
    )  # fmt: skip


AOT = [_case(form, dtype) for form in POINTERS for dtype in (torch.bfloat16, torch.float32)]
