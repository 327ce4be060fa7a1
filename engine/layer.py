"""`SliceLinear`: a frozen Linear that also collects the gradients of its slice.

The forward output is exactly the base layer's: adapters contribute nothing to it
(method.md, step 1). Beside it, p = x Aᵀ is kept; backward turns dy, x and p into the
two thin gradients. Issues no collectives: ZeRO-3 gathers W around forward and
backward, and a collective from an autograd hook would interleave with its own in
a rank-dependent order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import api as kernels

# zero.Init replaces torch.nn.functional.linear for the whole process by a Function that saves
# the gathered weight even when it is frozen; this is the operator underneath it.
linear = torch._C._nn.linear  # type: ignore[attr-defined]


@dataclass
class ActiveSlice:
    """Which of the rank's own slices the current micro-batch feeds; shared by all layers of an engine."""

    index: int = 0


@dataclass
class LayerFactors:
    """The factors of one weight for the slices this rank owns.

    Attributes:
        A: per own slice an fp32 leaf (R × I) whose `.grad` is a view of a flat buffer.
        B: per own slice an fp32 leaf (O × R), likewise.
        active: the engine's choice of slice.
        reached: whether any backward pass has delivered gradients here.
    """

    active: ActiveSlice
    A: list[Tensor] = field(default_factory=list)
    B: list[Tensor] = field(default_factory=list)
    reached: bool = False


class SliceLinear(nn.Linear):
    """An `nn.Linear` whose class was swapped in place; created by `adapt.install`, not by a constructor.

    The factors live in the instance's `__dict__` as plain tensors, so that ZeRO-3 neither shards,
    broadcasts, averages nor casts them, and so that `state_dict()` stays the base model's.
    """

    slice_factors: LayerFactors

    def forward(self, x: Tensor) -> Tensor:
        """y = x Wᵀ + bias; x: (…, I) → (…, O)."""
        if not (self.training and torch.is_grad_enabled()):
            return linear(x, self.weight, self.bias)
        factors = self.slice_factors
        i = factors.active.index
        return _SliceLinearFunction.apply(x, factors.A[i], factors.B[i], self.weight, self.bias, factors)


class _SliceLinearFunction(torch.autograd.Function):
    """y = x Wᵀ + bias with gradients for x, A and B; W and bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x, A_RI, B_OR, weight, bias, factors):  # type: ignore[override]
        y = linear(x, weight, bias)
        p_TR = kernels.low_rank_forward(x.reshape(-1, x.shape[-1]), A_RI)
        ctx.save_for_backward(x, p_TR)
        # W stays the Parameter object: saved-tensor hooks (activation offload) would otherwise pack the
        # gathered weight, the whole model in the end. ZeRO-3 has gathered it again when backward runs.
        ctx.weight, ctx.B_OR, ctx.factors = weight, B_OR, factors
        return y

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[override]
        x, p_TR = ctx.saved_tensors
        dx = dy @ ctx.weight if ctx.needs_input_grad[0] else None
        dy_TO = dy.reshape(-1, dy.shape[-1])
        x_TI = x.reshape(-1, x.shape[-1])
        grad_A_RI, grad_B_OR = kernels.low_rank_backward(dy_TO, x_TI, p_TR, ctx.B_OR)
        ctx.factors.reached = True
        return dx, grad_A_RI, grad_B_OR, None, None, None
