"""What crosses the network in an optimizer step, how many bytes that is, and which of two ways a weight takes.

Both ways work within an exchange group, that is a set of ranks which own every slice exactly once, and bring the
members' slices to the members' shards. Ranks that share a slice (K > S) average its gradients before that.

*Factor exchange.* Each rank must know all of every ΔA_i (they span whole rows of W) but of ΔB_i only
the rows that its shard touches. Per bucket: one all-gather of ΔA, one all-to-all of ΔB rows.

*Dense reduction.* Each rank forms the dense delta of its own slices on every member's shard; a reduce-scatter adds
them up on the way. It is the cheaper one where S·r comes near min(rows, cols).

Bytes are counted as this rank puts them on the wire: a ring all-gather, all-reduce or reduce-scatter passes parts on
G − 1 times, an all-to-all sends every part once. Nothing is counted that stays on the rank.
`predicted_bytes` says the same from the shapes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..method.targets import Target
from ..sharding.slicing import SlicePlan
from .buckets import Bucket

# torch 2.13 renamed these two and warns of the old names at every call.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# --- the cost model -------------------------------------------------------------------------------


def factor_bytes(target: Target, plan: SlicePlan, itemsize: int) -> int:
    """Bytes that this rank sends for a target by factor exchange."""
    own = plan.slices_per_rank * target.r
    A = (plan.group_size - 1) * own * target.cols
    B = sum(own * target.ranges[peer].rows for peer in plan.group if peer != plan.rank)
    return itemsize * (A + B)


def dense_bytes(target: Target, plan: SlicePlan, itemsize: int) -> int:
    """Bytes that this rank sends for a target by dense reduction, padding included."""
    return itemsize * (plan.group_size - 1) * target.shard_size


def choose_kinds(targets: Sequence[Target], plan: SlicePlan, exchange: str) -> None:
    """Sets every target's `kind`.

    Args:
        exchange: "factor", "dense", or "auto": per target what sends fewer bytes, summed over all ranks so that they
            decide alike; factors where it makes no difference. Both send the same dtype, so it cancels.
    """
    for target in targets:
        if exchange == "auto":
            target.kind = "dense" if _dense_is_cheaper(target, plan) else "factor"
        else:
            target.kind = "dense" if exchange == "dense" else "factor"


def _dense_is_cheaper(target: Target, plan: SlicePlan) -> bool:
    if plan.group_size == 1:  # nothing is sent
        return False
    # over all ranks, and without the common factor group_size − 1: each rank's rows are sent by that many peers
    touched = sum(owned.rows for owned in target.ranges)
    factors = plan.slices_per_rank * target.r * (plan.world_size * target.cols + touched)
    return plan.world_size * target.shard_size < factors


def predicted_bytes(targets: Sequence[Target], plan: SlicePlan, itemsize: int, *, ballot: int) -> int:
    """Bytes that this rank sends in one step.

    Args:
        itemsize: of the dtype of factors and dense deltas on the wire.
        ballot: float64 numbers in the vote.
    """
    cost = {"factor": factor_bytes, "dense": dense_bytes}
    grads = 4 * sum(t.factor_numel(plan.slices_per_rank) for t in targets)
    summed = _ring_sum(8 * ballot, plan.world_size) + _ring_sum(grads, plan.ranks_per_slice)
    return summed + sum(cost[t.kind](t, plan, itemsize) for t in targets)


def _ring_sum(nbytes: int, ranks: int) -> int:
    """Bytes that each rank sends in a ring all-reduce."""
    return 2 * (ranks - 1) * nbytes // ranks


# --- the collectives ------------------------------------------------------------------------------


@dataclass
class Received:
    """All slices' factors of a bucket as they came; `A` and `B` put one target's together when it is needed.

    Attributes:
        gathered: A's part, (G × numel_A), in the layout of `Bucket`.
        rows: B's part, per target (G × own × C × R) with C the rows that this rank's shard touches, maybe 0.
    """

    bucket: Bucket
    gathered: Tensor
    rows: list[Tensor]

    def A(self, index: int) -> Tensor:
        """Q × I, slices in order; a view where the bucket holds one target, or the group one rank."""
        before, width = sum(self.bucket.widths_A[:index]), self.bucket.widths_A[index]
        cols = self.bucket.targets[index].cols
        return self.gathered[:, before : before + width].unflatten(1, (-1, cols)).flatten(0, 1)

    def B(self, index: int) -> Tensor:
        """C × Q, slices in order."""
        return self.rows[index].permute(2, 0, 1, 3).flatten(1)


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
        self._exchange_group = self._own_group(plan.exchange_groups())
        self._slice_group = self._own_group(plan.slice_groups())

    def _own_group(self, groups: list[list[int]]) -> dist.ProcessGroup | None:
        if len(groups) == 1 or all(len(g) == 1 for g in groups):
            return None  # a group of one never communicates
        made = [(g, dist.new_group(g)) for g in groups]
        return next(handle for g, handle in made if self.plan.rank in g)

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
            self._count(_ring_sum(values.nbytes, world))

    def max_over_world(self, values: Tensor) -> None:
        """In-place maximum over all ranks; not for steps, and not counted."""
        if self.plan.world_size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)

    def sum_over_sharers(self, grads: Tensor) -> None:
        """In-place sum of flat factor gradients over the ranks that share this rank's slice."""
        share = self.plan.ranks_per_slice
        if share > 1:
            dist.all_reduce(grads, group=self._slice_group)
            self._count(_ring_sum(grads.nbytes, share))

    def factors(self, bucket: Bucket, own: Tensor) -> Received:
        """Every slice's factors of a bucket, of B only the rows that this rank's shard touches.

        Args:
            own: flat (numel_A + numel_B) of the own slices, in the layout of `Bucket`.
        """
        return self.fetch(bucket, *own.split([bucket.numel_A, bucket.numel_B]))

    def fetch(self, bucket: Bucket, own_A: Tensor, own_B: Tensor) -> Received:
        """`factors` of two flat parts (numel_A), (numel_B)."""
        return Received(bucket, self._gather_A(own_A), self._rows_to_owners(bucket, own_B))

    def _gather_A(self, own: Tensor) -> Tensor:
        size = self.plan.group_size
        if size == 1:
            return own.view(1, -1)
        received = own.new_empty(size, own.numel())
        _all_gather(received.view(-1), own, group=self._exchange_group)
        self._count((size - 1) * own.nbytes)
        return received

    def _rows_to_owners(self, bucket: Bucket, own: Tensor) -> list[Tensor]:
        plan, group = self.plan, self.plan.group
        matrices = bucket.views_B(own)
        if len(group) == 1:
            return [self._rows(m, t, plan.rank)[None] for m, t in zip(matrices, bucket.targets, strict=True)]
        outgoing = [[self._rows(m, t, rank) for m, t in zip(matrices, bucket.targets, strict=True)] for rank in group]
        sizes = [sum(part.numel() for part in parts) for parts in outgoing]
        packed = torch.cat([part.reshape(-1) for parts in outgoing for part in parts])
        mine = sizes[group.index(plan.rank)]
        received = own.new_empty(len(group), mine)
        dist.all_to_all_single(received.view(-1), packed, [mine] * len(group), sizes, group=self._exchange_group)
        self._count((packed.numel() - mine) * packed.element_size())
        own_slices = plan.slices_per_rank
        rows = [t.own_range(plan).rows for t in bucket.targets]
        widths = [own_slices * n * t.r for n, t in zip(rows, bucket.targets, strict=True)]
        return [
            part.unflatten(1, (own_slices, n, t.r))
            for part, n, t in zip(received.split(widths, dim=1), rows, bucket.targets, strict=True)
        ]

    @staticmethod
    def _rows(matrix_SOR: Tensor, target: Target, rank: int) -> Tensor:
        owned = target.ranges[rank]
        return matrix_SOR[:, owned.row_start : owned.row_stop]

    def reduce_to_owners(self, parts_GN: Tensor) -> Tensor:
        """Sums dense deltas over the exchange group; row g goes to its g-th member. Returns this rank's row."""
        size = self.plan.group_size
        if size == 1:
            return parts_GN[0]
        received = parts_GN.new_empty(parts_GN.shape[1])
        _reduce_scatter(received, parts_GN.view(-1), group=self._exchange_group)
        self._count((size - 1) * received.nbytes)
        return received
