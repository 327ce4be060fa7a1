"""What crosses the network in an optimizer step, and how many bytes.

Factor exchange. Each rank must know all of every ΔA_i (they span whole rows of W) but of ΔB_i only
the rows that its shard touches. Per bucket of targets: one all-gather of ΔA, one all-to-all of ΔB rows,
within an exchange group, that is a set of ranks which own every slice exactly once. Ranks that share
a slice (K > S) average its gradients before that.

Bytes are counted as this rank puts them on the wire: a ring all-gather or all-reduce passes each
rank's part on G − 1 times, an all-to-all sends every part once. Nothing is counted that stays on the rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .slicing import SlicePlan
from .targets import Bucket, Target


class FactorExchange:
    """Collectives of one run, on process groups made once; every rank must construct it at the same time.

    Attributes:
        bytes_sent: bytes sent by this rank since the last `reset_count`.
        collectives: calls since then.
    """

    def __init__(self, plan: SlicePlan) -> None:
        self.plan = plan
        self.bytes_sent = 0
        self.collectives = 0
        # Group creation is collective: all ranks make all groups in one order. None is the world.
        self._ranks, self._exchange_group = self._own_group(plan.exchange_groups())
        self._sharers, self._slice_group = self._own_group(plan.slice_groups())

    def _own_group(self, groups: list[list[int]]) -> tuple[list[int], dist.ProcessGroup | None]:
        if len(groups) == 1:
            return groups[0], None
        if all(len(g) == 1 for g in groups):
            return [self.plan.rank], None
        made = [(g, dist.new_group(g)) for g in groups]
        return next((g, handle) for g, handle in made if self.plan.rank in g)

    def reset_count(self) -> None:
        """Starts the count of a new step."""
        self.bytes_sent = self.collectives = 0

    def _count(self, nbytes: int) -> None:
        self.bytes_sent += nbytes
        self.collectives += 1

    def sum_over_world(self, values: Tensor) -> None:
        """In-place sum over all ranks (the vote and the metrics of a step)."""
        world = self.plan.world_size
        if world > 1:
            dist.all_reduce(values)
            self._count(2 * (world - 1) * values.nbytes // world)

    def sum_over_sharers(self, grads: Tensor) -> None:
        """In-place sum of flat factor gradients over the ranks that share this rank's slice."""
        share = len(self._sharers)
        if share > 1:
            dist.all_reduce(grads, group=self._slice_group)
            self._count(2 * (share - 1) * grads.nbytes // share)

    def gather_A(self, bucket: Bucket, own: Tensor) -> list[Tensor]:
        """All slices' A-shaped factors of a bucket.

        Args:
            own: flat (bucket.numel_A), laid out as `Bucket` says.

        Returns: per target Q × I, slices in order.
        """
        plan, size = self.plan, self.plan.group_size
        received = own.new_empty(size, bucket.numel_A)
        if size > 1:
            dist.all_gather(list(received.unbind(0)), own.contiguous(), group=self._exchange_group)
            self._count((size - 1) * own.nbytes)
        else:
            received[0].copy_(own)
        widths = [plan.slices_per_rank * t.r * t.cols for t in bucket.targets]
        parts = received.split(widths, dim=1)
        return [p.reshape(plan.slices * t.r, t.cols) for p, t in zip(parts, bucket.targets, strict=True)]

    def rows_to_owners(self, bucket: Bucket, own: Tensor) -> list[Tensor]:
        """All slices' B-shaped factors, but only the rows that this rank's shard touches.

        Args:
            own: flat (bucket.numel_B), laid out as `Bucket` says.

        Returns: per target C × Q with C the rows touched (may be 0), slices in order.
        """
        plan = self.plan
        matrices = [
            part.view(plan.slices_per_rank, t.rows, t.r)
            for part, t in zip(own.split(self._widths_B(bucket)), bucket.targets, strict=True)
        ]
        outgoing = [
            [self._rows(m, t, rank) for m, t in zip(matrices, bucket.targets, strict=True)] for rank in self._ranks
        ]
        sizes = [sum(part.numel() for part in parts) for parts in outgoing]
        packed = torch.cat([part.reshape(-1) for parts in outgoing for part in parts])
        mine = sizes[self._ranks.index(plan.rank)]
        received = own.new_empty(len(self._ranks), mine)
        if len(self._ranks) > 1:
            dist.all_to_all_single(
                received.view(-1), packed, [mine] * len(self._ranks), sizes, group=self._exchange_group
            )
            self._count((packed.numel() - mine) * packed.element_size())
        else:
            received[0].copy_(packed)
        return self._unpack_rows(bucket, received)

    def _widths_B(self, bucket: Bucket) -> list[int]:
        return [self.plan.slices_per_rank * t.r * t.rows for t in bucket.targets]

    @staticmethod
    def _rows(matrix_SOR: Tensor, target: Target, rank: int) -> Tensor:
        owned = target.ranges[rank]
        return matrix_SOR[:, owned.row_start : owned.row_stop]

    def _unpack_rows(self, bucket: Bucket, received: Tensor) -> list[Tensor]:
        plan = self.plan
        rows = [t.own_range(plan).rows for t in bucket.targets]
        widths = [plan.slices_per_rank * n * t.r for n, t in zip(rows, bucket.targets, strict=True)]
        result = []
        for part, n, t in zip(received.split(widths, dim=1), rows, bucket.targets, strict=True):
            by_slice = part.reshape(plan.slices, n, t.r)
            result.append(by_slice.movedim(0, 1).reshape(n, plan.slices * t.r))
        return result
