"""How a slice's gradients become ΔA, ΔB, and how these become the change of a shard of W.

    m, v  ←  Adam(grad A_i, grad B_i)                   per slice, fp32, no weight decay
    W     ←  W − s · Σ_i (ΔB_i A_i + B_i ΔA_i − ΔB_i ΔA_i)          s = lora_alpha / r

A_i and B_i never change (method.md, step 4). The arithmetic is in `kernels`; here are the
hyper-parameters and the cutting of a flat shard into blocks of whole rows. No communication.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels import api as kernels
from .shards import Shard
from .slicing import ShardRange

# Elements of the fp32 block of W's change that is materialised at a time: 64 MiB.
BLOCK_ELEMENTS = 16 * 2**20


@dataclass(frozen=True)
class DeltaRule:
    """The hyper-parameters of the update.

    Attributes:
        betas, eps: of Adam.
        second_order: whether the term ΔB ΔA is kept (the published method keeps it).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    second_order: bool = True

    def adam_(self, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *, step: int, lr: float, grad_scale: float):
        """Moments in place; returns Δ (times the learning rate). See `kernels.reference.slice_adam_`."""
        return kernels.slice_adam_(
            exp_avg, exp_avg_sq, grad, step=step, lr=lr, betas=self.betas, eps=self.eps, grad_scale=grad_scale
        )

    def apply(
        self,
        shard: Shard,
        owned: ShardRange,
        factors: tuple[Tensor, Tensor],
        deltas: tuple[Tensor, Tensor],
        *,
        scale: float,
        block_elements: int = BLOCK_ELEMENTS,
    ) -> None:
        """Takes the summed delta off this rank's shard, block by block.

        Args:
            factors: (A: Q × I, B: rows touched × Q) of all slices.
            deltas: (ΔA, ΔB) of the same shapes.
            scale: lora_alpha / r.
            block_elements: bound on the temporary; at least one row is done at a time.
        """
        (A, B), (dA, dB) = factors, deltas
        step = max(1, block_elements // owned.cols)
        for first in range(0, owned.rows, step):
            last = min(first + step, owned.rows)
            change = kernels.delta_rows(dA, dB[first:last], A, B[first:last], second_order=self.second_order)
            # whole rows were computed; the shard may begin and end within one
            row0 = (owned.row_start + first) * owned.cols
            start = max(row0, owned.start)
            stop = min(row0 + change.numel(), owned.stop)
            flat = change.view(-1)[start - row0 : stop - row0]
            here = slice(start - owned.start, stop - owned.start)
            w = shard.read(here.start, here.stop)
            shard.write(here.start, here.stop, w.to(flat.device) - scale * flat)
