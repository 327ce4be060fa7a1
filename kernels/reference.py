"""The torch version of every kernel: plain, differentiable by nobody, any float dtype.

Shape letters, the same in every file of the project:

    T tokens   O out_features   I in_features   R rank of one slice   S slices
    N elements of the local flat shard          C rows of one chunk of a shard

`R` alone is the width of one slice; `Q` = S·R is the width of all slices side by side.
These functions run in float64 as well, which is what the tests compare against.
They import neither `engine` nor `torch.distributed`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_fp32(w_N: Tensor) -> tuple[Tensor, Tensor]:
    """Splits fp32 into its bf16 half and a signed 16-bit remainder, without loss.

    bits(w) = (bits(high) << 16) + low, with high rounded half up, so that low always fits
    int16 (round-half-even does not fit: the remainder reaches +32768). `high` equals
    torch's bf16 cast except at exact ties.

    A NaN whose payload carries over (0x7FFF8000 and above) shows as zero in `high`, one whose payload
    is below 0x8000 as infinity: look for NaN in the fp32 value, never in the half. Merging gives it
    back bit for bit.

    Example: 1.00390625 (0x3F808000, a tie) → high 1.0078125 (0x3F81), low −32768.

    Returns: (high, low), bf16 and int16 of w's shape.
    """
    bits = w_N.view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def merge_fp32(high_N: Tensor, low_N: Tensor) -> Tensor:
    """Inverse of `split_fp32`: fp32 from its bf16 half and 16-bit remainder, bit for bit."""
    bits = (high_N.view(torch.int16).to(torch.int32) << 16) + low_N.to(torch.int32)
    return bits.view(torch.float32)


def low_rank_forward(x_TI: Tensor, A_RI: Tensor) -> Tensor:
    """p = x Aᵀ (T × R) in x's dtype: all that the forward pass owes the slice.

    Example: x = [[1, 2]], A = [[3, 4]] → p = [[11]].
    """
    return x_TI @ A_RI.to(x_TI.dtype).t()


def low_rank_backward(dy_TO: Tensor, x_TI: Tensor, p_TR: Tensor, B_OR: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of one slice by two thin products; the O × I gradient of W is never formed.

        q = dy B (T × R)     grad A = qᵀ x (R × I)     grad B = dyᵀ p (O × R)

    Example: dy = [[2]], x = [[1, 2]], p = [[11]], B = [[5]] → grad A = [[10, 20]], grad B = [[22]].

    Returns: (grad A, grad B) in B's dtype (fp32 in training; the products run in dy's dtype).
    """
    q_TR = dy_TO @ B_OR.to(dy_TO.dtype)
    grad_A_RI = q_TR.t() @ x_TI
    grad_B_OR = dy_TO.t() @ p_TR
    return grad_A_RI.to(B_OR.dtype), grad_B_OR.to(B_OR.dtype)


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
) -> Tensor:
    """One bias-corrected Adam step; moments in place, returns Δ already multiplied by the learning rate.

        m ← β₁ m + (1−β₁) g      v ← β₂ v + (1−β₂) g²      with g = grad · grad_scale
        Δ = lr · (m / (1−β₁ᵗ)) / (√(v / (1−β₂ᵗ)) + ε)      t = step, counted from 1

    No weight decay (method.md, step 3). All tensors flat and of one dtype.

    Example: zero moments, g = 4, step 1, lr 0.1, ε 0 → Δ = 0.1.
    """
    beta1, beta2 = betas
    grad = grad * grad_scale
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.div(1 - beta2**step).sqrt_().add_(eps)
    return exp_avg.div(denominator).mul_(lr / (1 - beta1**step))


def delta_rows(dA_QI: Tensor, dB_CQ: Tensor, A_QI: Tensor, B_CQ: Tensor, *, second_order: bool) -> Tensor:
    """The change of W on some rows, summed over all slices (method.md, step 4).

        D = Σ_i (ΔB_i A_i + B_i ΔA_i − ΔB_i ΔA_i) = ΔB (A − ΔA) + B ΔA

    with the slices side by side along Q = S·R. Without `second_order` the term ΔB ΔA is left out.

    Example: A = [[1, 2]], B = [[3]], ΔA = [[0.5, 0]], ΔB = [[1]] → D = [[2, 2]] (first order [[2.5, 2]]).

    Returns: C × I, in the factors' dtype.
    """
    base = A_QI - dA_QI if second_order else A_QI
    return torch.addmm(dB_CQ @ base, B_CQ, dA_QI)
