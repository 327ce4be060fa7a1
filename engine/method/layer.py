"""`SliceLinear`: a frozen Linear that also collects the gradients of its slice.

The forward output is exactly the base layer's: adapters contribute nothing to it
(method.md, step 1). In addition, p = x Aᵀ is kept; backward turns dy, x and p into the
two thin gradients, which go straight into the fp32 buffers. Issues no collectives: ZeRO-3
gathers W around forward and backward, and a collective from an autograd hook would
interleave with its own in a rank-dependent order.

`SliceConv1D` is the same for GPT-2's Conv1D, whose weight is stored transposed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hdpissa.kernels import api as kernels

from ..distributed import heartbeat
from .shared_input import SharedInputs

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
        impl: of the kernels, see `kernels.api`.
        linear: "separate", which "auto" means (the library's product of W, and thin kernels), or "fused" (one kernel
            for both; off until a row measured on a GPU shows that it wins).
        inputs: finds Linears that share their input; None where grouping does not pay (CPU).
        reached: whether any backward pass has delivered gradients here.
    """

    active: ActiveSlice
    A: list[Tensor] = field(default_factory=list)
    B: list[Tensor] = field(default_factory=list)
    impl: kernels.Impl = "auto"
    linear: str = "auto"
    inputs: SharedInputs | None = None
    reached: bool = False


class SliceLinear(nn.Linear):
    """An `nn.Linear` whose class was swapped in place; created by `adapt.install`, not by a constructor.

    The factors live in the instance's `__dict__` as plain tensors, so that ZeRO-3 neither shards,
    broadcasts, averages nor casts them, and so that `state_dict()` stays the base model's.
    """

    slice_factors: LayerFactors

    def forward(self, x: Tensor) -> Tensor:
        """y = x Wᵀ + bias; x: (…, I) → (…, O)."""
        heartbeat.progress()
        if not (self.training and torch.is_grad_enabled()):
            return linear(x, self.weight, self.bias)
        factors = self.slice_factors
        i = factors.active.index
        return _SliceLinearFunction.apply(x, factors.A[i], factors.B[i], self.weight, self.bias, factors)


class _SliceLinearFunction(torch.autograd.Function):
    """y = x Wᵀ + bias with gradients for x, A, B, and for a bias that is trained (`modules_to_save`); W is frozen.

    A and B are inputs so that the graph reaches this node even where x needs no gradient. Their gradients are
    added to `.grad` here, in fp32 and without a copy; autograd gets None for them.
    """

    @staticmethod
    def forward(ctx: Any, x, A_RI, B_OR, weight, bias, factors):  # type: ignore[override]
        p_TR = group = None
        if factors.inputs is not None:
            p_TR, group = factors.inputs.join(x, factors)
        y, p_TR = _products(x, weight, bias, A_RI, p_TR, factors)
        ctx.save_for_backward(x, p_TR)
        # W stays the Parameter object: saved-tensor hooks (activation offload) would otherwise pack the
        # gathered weight, the whole model in the end. ZeRO-3 has gathered it again when backward runs.
        ctx.weight, ctx.A_RI, ctx.B_OR, ctx.factors, ctx.group = weight, A_RI, B_OR, factors, group
        return y

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[override]
        heartbeat.progress()
        x, p_TR = ctx.saved_tensors
        factors, grad_A_RI = ctx.factors, ctx.A_RI.grad
        dx, q_TR = _products_backward(dy, p_TR, ctx.weight, ctx.B_OR, factors, wanted=ctx.needs_input_grad[0])
        x_TI = x.reshape(-1, x.shape[-1])
        if ctx.group is None:
            kernels.low_rank_grad_A_([grad_A_RI], [q_TR], x_TI, impl=factors.impl)
        else:
            ctx.group.deposit(grad_A_RI, q_TR, x_TI)
        factors.reached = True
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[4] else None
        return dx, None, None, None, dbias, None


class SliceConv1D(nn.Module):
    """transformers' `Conv1D` (GPT-2), its class swapped like `SliceLinear`'s: y = x W + bias with W (I × O) as stored.

    A target is a matrix as it is stored, here the transpose of a Linear's. Its slices are the transposes, too: with
    A (R × O) and B (I × R) the update of step 4 in method.md, transposed, is the same formula. Only the roles of x and
    dy change places, so that both gradients are made in backward:

        grad A = (x B)ᵀ dy          grad B = xᵀ (dy Aᵀ)
    """

    slice_factors: LayerFactors
    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, I) → (…, O)."""
        heartbeat.progress()
        if not (self.training and torch.is_grad_enabled()):
            return _conv1d(x, self.weight, self.bias)
        factors = self.slice_factors
        i = factors.active.index
        return _SliceConv1DFunction.apply(x, factors.A[i], factors.B[i], self.weight, self.bias, factors)


def _conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


class _SliceConv1DFunction(torch.autograd.Function):
    """As `_SliceLinearFunction`; x alone is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x, A_RO, B_IR, weight, bias, factors):  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.weight, ctx.A_RO, ctx.B_IR, ctx.factors = weight, A_RO, B_IR, factors
        return _conv1d(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[override]
        heartbeat.progress()
        (x,) = ctx.saved_tensors
        factors, impl = ctx.factors, ctx.factors.impl
        x_TI, dy_TO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        p_TR = kernels.low_rank_forward(dy_TO, ctx.A_RO, impl=impl)
        q_TR = kernels.low_rank_grad_B_(ctx.B_IR.grad, x_TI, p_TR, ctx.B_IR, impl=impl)
        kernels.low_rank_grad_A_([ctx.A_RO.grad], [q_TR], dy_TO, impl=impl)
        factors.reached = True
        dx = dy @ ctx.weight.t() if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, None


def _products(
    x: Tensor, weight: Tensor, bias: Tensor | None, A_RI: Tensor, p_TR: Tensor | None, factors: LayerFactors
) -> tuple[Tensor, Tensor]:
    """(y, p); p is not computed again where a neighbour with the same x has done it."""
    if p_TR is not None:
        return linear(x, weight, bias), p_TR
    x_TI = x.reshape(-1, x.shape[-1])
    if factors.linear == "fused":
        y_TO, p_TR = kernels.fused_linear(x_TI, weight, A_RI, bias, impl=factors.impl)
        return y_TO.view(*x.shape[:-1], -1), p_TR
    return linear(x, weight, bias), kernels.low_rank_forward(x_TI, A_RI, impl=factors.impl)


def _products_backward(
    dy: Tensor, p_TR: Tensor, weight: Tensor, B_OR: Tensor, factors: LayerFactors, *, wanted: bool
) -> tuple[Tensor | None, Tensor]:
    """(dx if wanted, q), and grad B added to its buffer."""
    dy_TO = dy.reshape(-1, dy.shape[-1])
    grad_B_OR = B_OR.grad
    assert grad_B_OR is not None
    if wanted and factors.linear == "fused":
        dx_TI, q_TR = kernels.fused_linear(dy_TO, weight.t(), B_OR.t(), impl=factors.impl)
        kernels.low_rank_grad_B_(grad_B_OR, dy_TO, p_TR, B_OR, q_TR, impl=factors.impl)
        return dx_TI.view(*dy.shape[:-1], -1), q_TR
    q_TR = kernels.low_rank_grad_B_(grad_B_OR, dy_TO, p_TR, B_OR, impl=factors.impl)
    return dy @ weight if wanted else None, q_TR
