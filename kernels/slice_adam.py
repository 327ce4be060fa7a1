"""One Adam step over the flat buffers of all slices' factors: 28 bytes of traffic per element, in one pass.

    m ← β₁ m + (1−β₁) g      v ← β₂ v + (1−β₂) g²      with g = grad · grad_scale
    Δ = lr · (m / (1−β₁ᵗ)) / (√(v / (1−β₂ᵗ)) + ε)

All tensors flat (N) fp32; Δ fp32, or bf16 for the wire. The bias corrections are worked out on the host in float64.

Example: zero moments, g = 4, step 1, lr 0.1, ε 0 → Δ = 0.1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import POINTER, AotCase, narrow, require, require_contiguous, require_same_device

BLOCK, WARPS = 1024, 4
SCALARS = ("grad_scale", "rate1", "beta2", "rate2", "correction2", "eps", "size")


# Every step has other corrections: as specialised constants (a 1 is one) they would compile the kernel anew.
@triton.jit(do_not_specialize=SCALARS)
def adam(
    m, v, grad, delta, numel,
    grad_scale, rate1, beta2, rate2, correction2, eps, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """rate = 1 − β, correction2 = 1 − β₂ᵗ, size = lr / (1 − β₁ᵗ)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    g = tl.load(grad + at, mask=inside, other=0.0) * grad_scale
    old_m, old_v = tl.load(m + at, mask=inside, other=0.0), tl.load(v + at, mask=inside, other=0.0)
    new_m = old_m + rate1 * (g - old_m)
    new_v = old_v * beta2 + rate2 * (g * g)
    change = tl.div_rn(new_m, tl.sqrt_rn(tl.div_rn(new_v, correction2)) + eps) * size
    tl.store(m + at, new_m, mask=inside)
    tl.store(v + at, new_v, mask=inside)
    tl.store(delta + at, narrow(change, delta.dtype.element_ty), mask=inside)


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
    """Launches `adam`. See `reference.slice_adam_`."""
    tensors = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "grad": grad}
    for name, tensor in tensors.items():
        require(tensor.dtype == torch.float32, f"slice_adam_: {name} is {tensor.dtype}, must be float32")
        require(tensor.shape == grad.shape, f"slice_adam_: {name} is {tuple(tensor.shape)}, grad {tuple(grad.shape)}")
    dtype = dtype or grad.dtype
    require(dtype in (torch.float32, torch.bfloat16), f"slice_adam_: dtype is {dtype}, must be fp32 or bf16")
    require_contiguous("slice_adam_", **tensors)
    require_same_device("slice_adam_", *tensors.values())
    delta = torch.empty_like(grad, dtype=dtype)
    beta1, beta2 = betas
    if grad.numel():
        adam[(triton.cdiv(grad.numel(), BLOCK),)](
            exp_avg, exp_avg_sq, grad, delta, grad.numel(),
            grad_scale, 1 - beta1, beta2, 1 - beta2, 1 - beta2**step, eps, lr / (1 - beta1**step),
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return delta


def _case(dtype: torch.dtype) -> AotCase:
    return AotCase(
        name=f"slice_adam delta {str(dtype)[6:]}",
        kernel=adam,
        signature={
            **dict.fromkeys(("m", "v", "grad"), POINTER[torch.float32]),
            "delta": POINTER[dtype],
            "numel": "i32:16",
            **dict.fromkeys(SCALARS, "fp32"),
        },
        constexprs={"BLOCK": BLOCK},
        num_warps=WARPS,
        num_stages=3,
        tensor_core=False,
    )


AOT = [_case(dtype) for dtype in (torch.float32, torch.bfloat16)]
