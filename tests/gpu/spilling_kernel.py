"""A kernel that must spill, with an `AOT` like the real ones: the control of test_kernel_aot.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hdpissa.kernels.common import POINTER, AotCase


@triton.jit
def spilling(x, out, SIZE: tl.constexpr):
    """out = softmax of a SIZE × SIZE matrix along each side, added up: both are alive to the end, in one warp."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    value = tl.exp(tl.load(x + at))
    tl.store(out + at, value / tl.sum(value, 0)[None, :] + value / tl.sum(value, 1)[:, None])


def _case(target: str, **few_registers: int) -> AotCase:
    return AotCase(
        name="spilling",
        kernel=spilling,
        signature={"x": POINTER[torch.float32], "out": POINTER[torch.float32]},
        constexprs={"SIZE": 64},  # 128 values in each of 32 threads, 64 in each of AMD's 64
        num_warps=1,
        num_stages=1,
        tensor_core=False,
        options=few_registers,
        targets=(target,),
    )


AOT = [_case("sm_90", maxnreg=32), _case("gfx942", waves_per_eu=8)]
