"""How a slice's gradients become ΔA, ΔB, and how these become the change of a shard of W.

    m, v  ←  Adam(grad A_i, grad B_i)                   per slice, fp32, no weight decay
    W     ←  W − s · Σ_i (ΔB_i A_i + B_i ΔA_i − ΔB_i ΔA_i)          s = lora_alpha / r

A_i and B_i never change (method.md, step 4). The arithmetic is in `kernels`; here are the
hyper-parameters, and which rows and which part of a shard a kernel gets. No communication.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hdpissa.kernels import api as kernels

from ..sharding.shards import Shard, on_device
from ..sharding.slicing import ShardRange

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # as the config names them


@dataclass(frozen=True)
class DeltaRule:
    """The hyper-parameters of the update.

    Attributes:
        betas, eps: of Adam.
        second_order: whether the term ΔB ΔA is kept (the published method keeps it).
        dtype: on the wire, of ΔA and ΔB (factor exchange) or of the dense deltas.
        precision: of the products in `apply`, "fp32" or "tf32".
        impl: of the kernels.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    second_order: bool = True
    dtype: torch.dtype = torch.float32
    precision: str = "fp32"
    impl: kernels.Impl = "auto"

    def adam_(
        self,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        grad: Tensor,
        *,
        step: int,
        lr: float,
        grad_scale: float,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Moments in place; returns Δ (times the learning rate) in `dtype`. See `kernels.reference.slice_adam_`."""
        return kernels.slice_adam_(
            exp_avg,
            exp_avg_sq,
            grad,
            step=step,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            grad_scale=grad_scale,
            dtype=dtype,
            impl=self.impl,
        )

    def apply(
        self,
        shard: Shard,
        owned: ShardRange,
        factors: tuple[Tensor, Tensor],
        deltas: tuple[Tensor, Tensor],
        bad: Tensor,
        *,
        scale: float,
    ) -> None:
        """Takes the summed delta of all slices off this rank's shard; one kernel, unless the shard is staged.

        Args:
            factors: (A: Q × I, B: rows touched × Q) of all slices.
            deltas: (ΔA, ΔB) of the same shapes.
            bad: int32 (1), grows by the number of weights whose new value is not finite; they stay as they are.
            scale: lora_alpha / r.
        """
        (A, B), (dA, dB) = factors, deltas
        if not owned.numel:
            return
        for offset, parts in on_device(shard.parts(), A.device):
            here = owned.part(offset, offset + parts[0].numel())
            rows = slice(here.row_start - owned.row_start, here.row_stop - owned.row_start)
            kernels.delta_apply_(
                parts,
                dA,
                dB[rows],
                A,
                B[rows],
                bad,
                start=here.start,
                scale=scale,
                second_order=self.second_order,
                precision=self.precision,
                impl=self.impl,
            )

    def dense(
        self, where: ShardRange, factors: tuple[Tensor, Tensor], deltas: tuple[Tensor, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """The own slices' change of W on a flat range, unscaled; flat (numel) in `dtype`.

        Args:
            factors: (A: own · R × I, B: own × O × R) of the own slices, whole.
            deltas: (ΔA, ΔB) of the same shapes.
        """
        (A, B), (dA, dB) = factors, deltas
        return kernels.dense_delta(
            dA,
            _side_by_side(dB, where),
            A,
            _side_by_side(B, where),
            start=where.start,
            numel=where.numel,
            second_order=self.second_order,
            dtype=dtype,
            impl=self.impl,
        )

    def subtract(self, shard: Shard, begin: int, D: Tensor, bad: Tensor, *, scale: float) -> None:
        """Takes a dense delta off elements [begin, begin + numel) of this rank's shard; `bad` as in `apply`."""
        if not D.numel():
            return
        parts = tuple(part[begin : begin + D.numel()] for part in shard.parts())
        for offset, here in on_device(parts, D.device):
            kernels.shard_subtract_(here, D[offset : offset + here[0].numel()], bad, scale=scale, impl=self.impl)


def _side_by_side(matrices_SOR: Tensor, where: ShardRange) -> Tensor:
    """The rows that a range touches, slices side by side (C × own · R); a view for a single slice."""
    return matrices_SOR[:, where.row_start : where.row_stop].movedim(0, 1).flatten(1)
