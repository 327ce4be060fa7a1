"""Storage of one rank's slice factors, their gradients and Adam moments: a few flat buffers and views.

Per target: `A` of all slices (Q × I, each rank's update needs them whole), the rows of `B` of all slices
that its shard touches (C × Q), and for the slices it owns the whole `B` (own × O × R), because gradients
need it. Gradients and moments of the own slices lie in flat fp32 buffers in bucket order, so that one
kernel walks over all layers; autograd adds straight into them through the leaves' `.grad`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .exchange import FactorExchange
from .layer import ActiveSlice, LayerFactors
from .slicing import SlicePlan
from .targets import Bucket, Target


class FactorStore:
    """All factors of one rank.

    Attributes:
        grads, exp_avg, exp_avg_sq: flat fp32, own slices of all targets, laid out as `Bucket` says.
        own_B: per bucket flat (numel_B), the fixed B of the own slices.
        A, B_rows: per target (Q × I) and (C × Q), the fixed factors of all slices.
        layers: per target what its `SliceLinear` modules read.
    """

    def __init__(self, plan: SlicePlan, buckets: Sequence[Bucket], device: torch.device) -> None:
        self.plan = plan
        self.buckets = list(buckets)
        self.targets: list[Target] = [t for bucket in buckets for t in bucket.targets]
        numel = buckets[-1].stop
        self.grads, self.exp_avg, self.exp_avg_sq = (torch.zeros(numel, device=device) for _ in range(3))
        self.own_B: list[Tensor] = []
        self.A: dict[str, Tensor] = {}
        self.B_rows: dict[str, Tensor] = {}
        self.active = ActiveSlice()
        self.layers = {t.name: LayerFactors(self.active) for t in self.targets}

    def fill(self, bucket: Bucket, own_A: Tensor, own_B: Tensor, exchange: FactorExchange) -> None:
        """Takes the fixed factors of a bucket's own slices and fetches the peers' parts; collective.

        Args:
            own_A, own_B: flat (numel_A), (numel_B).
        """
        self.own_B.append(own_B)
        gathered = exchange.gather_A(bucket, own_A)
        rows = exchange.rows_to_owners(bucket, own_B)
        for target, A, B in zip(bucket.targets, gathered, rows, strict=True):
            # a bucket of one target may come back as a view of the receive buffer: same bytes, no copy
            self.A[target.name], self.B_rows[target.name] = A, B
        self._make_leaves(bucket, own_B)

    def _make_leaves(self, bucket: Bucket, own_B: Tensor) -> None:
        plan, own = self.plan, self.plan.slices_per_rank
        at_A, at_B, from_B = bucket.start, bucket.stop_A, 0
        for t in bucket.targets:
            layer = self.layers[t.name]
            A_SRI = self.A[t.name].view(plan.slices, t.r, t.cols)
            B_SOR = own_B[from_B : from_B + own * t.r * t.rows].view(own, t.rows, t.r)
            for k, slice_id in enumerate(plan.owned):
                layer.A.append(self._leaf(A_SRI[slice_id], at_A + k * t.r * t.cols))
                layer.B.append(self._leaf(B_SOR[k], at_B + k * t.r * t.rows))
            at_A += own * t.r * t.cols
            at_B += own * t.r * t.rows
            from_B += own * t.r * t.rows

    def _leaf(self, values: Tensor, offset: int) -> Tensor:
        """An autograd leaf over fixed values, whose gradient accumulates at `offset` of the flat buffer."""
        leaf = values.detach().requires_grad_()
        leaf.grad = self.grads[offset : offset + values.numel()].view_as(values)
        return leaf

    def leaves(self) -> list[Tensor]:
        """All leaves, A before B, target by target."""
        return [leaf for layer in self.layers.values() for leaf in (*layer.A, *layer.B)]

    def unreached(self) -> list[str]:
        """Targets that no backward pass has reached yet."""
        return [name for name, layer in self.layers.items() if not layer.reached]

    @property
    def nbytes_factors(self) -> int:
        """Bytes of the fixed factors: A of all slices, B rows of all slices, B of the own ones."""
        return sum(t.nbytes for t in (*self.own_B, *self.A.values(), *self.B_rows.values()))

    @property
    def nbytes_state(self) -> int:
        """Bytes of gradients and moments."""
        return self.grads.nbytes + self.exp_avg.nbytes + self.exp_avg_sq.nbytes
