"""How trained weights are bundled for the network, and how much memory a bundle's step takes.

A `Bucket` is a run of targets of one kind that is stepped at once. A factor bucket costs two collectives.
A dense bucket costs one per *round*; it has one round, unless it holds a single matrix that is too large for
the buffers and goes in pieces: piece j of every rank's shard at a time. So the number of collectives grows with
the bytes of all targets over `delta.bucket_bytes`, not with the number of layers. Integers only: no communication.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..method.targets import Kind, Target
from ..sharding.slicing import ShardRange, SlicePlan


@dataclass(frozen=True)
class Piece:
    """Elements [begin, end) of every rank's shard of a target; a short last shard may have fewer, or none."""

    target: Target
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Elements per rank on the wire, padding included."""
        return self.end - self.begin

    def of(self, rank: int) -> ShardRange:
        """What `rank` owns of it."""
        return self.target.ranges[rank].part(self.begin, self.end)

    def is_whole(self, plan: SlicePlan) -> bool:
        """Whether the pieces of the exchange group make up the whole matrix."""
        return self.size == self.target.shard_size and plan.ranks_per_slice == 1


@dataclass
class Bucket:
    """Targets of one kind that are stepped together, and where they lie in the rank's flat buffers.

    The flat layout of a bucket is [A of every target][B of every target], own slices innermost-first:
    A of a target is (own slices × R × I), B is (own slices × O × R), both row-major.

    Attributes:
        rounds: of a dense bucket, the pieces that share a reduce-scatter.
    """

    targets: list[Target]
    start: int
    plan: SlicePlan
    kind: Kind = "factor"
    rounds: list[list[Piece]] | None = None

    def __post_init__(self) -> None:
        own = self.plan.slices_per_rank
        self.widths_A = [own * t.r * t.cols for t in self.targets]
        self.widths_B = [own * t.r * t.rows for t in self.targets]
        self.numel_A, self.numel_B = sum(self.widths_A), sum(self.widths_B)
        self.stop = self.start + self.numel_A + self.numel_B
        if self.rounds is None:
            self.rounds = [[Piece(t, 0, t.shard_size) for t in self.targets]] if self.kind == "dense" else []

    @property
    def stop_A(self) -> int:
        """End of the A part, start of the B part, in the rank's flat buffers."""
        return self.start + self.numel_A

    @property
    def collectives(self) -> int:
        """Collective calls per step, where there are other ranks to exchange with."""
        return len(self.rounds or ()) if self.kind == "dense" else 2

    def views_A(self, flat: Tensor) -> list[Tensor]:
        """The A part (numel_A) of a flat buffer, per target (own · R × I)."""
        return [part.view(-1, t.cols) for part, t in zip(flat.split(self.widths_A), self.targets, strict=True)]

    def views_B(self, flat: Tensor) -> list[Tensor]:
        """The B part (numel_B) of a flat buffer, per target (own × O × R)."""
        return [part.view(-1, t.rows, t.r) for part, t in zip(flat.split(self.widths_B), self.targets, strict=True)]

    def split(self, flat: Tensor) -> Iterator[tuple[Target, Tensor, Tensor]]:
        """Yields (target, A: own · R × I, B: own × O × R), views of the bucket's flat (numel_A + numel_B)."""
        A, B = flat.split([self.numel_A, self.numel_B])
        yield from zip(self.targets, self.views_A(A), self.views_B(B), strict=True)

    def buffer_bytes(self, itemsize: int) -> int:
        """Most bytes that this rank's step of the bucket allocates at a time, besides the kernels' own blocks.

        Args:
            itemsize: of the dtype on the wire.
        """
        if self.kind == "factor":
            rows = [t.own_range(self.plan).rows for t in self.targets]
            members = slice(self.plan.replica, None, self.plan.ranks_per_slice)  # of `plan.group`
            sent = sum(sum(_rows_by_rank(t)[members]) * t.r for t in self.targets)
            return _factor_bytes(self.targets, self.plan, rows, sent * self.plan.slices_per_rank, itemsize)
        group = self.plan.group
        return max(_dense_bytes(self.targets, pieces, self.plan, itemsize, group) for pieces in self.rounds or ())


def make_buckets(targets: Sequence[Target], plan: SlicePlan, bucket_bytes: int, itemsize: int = 4) -> list[Bucket]:
    """Factor buckets, then dense ones, each filled in model order up to `bucket_bytes` of buffers.

    A bucket holds at least one target, a round at least one row of it.
    """
    buckets: list[Bucket] = []
    for kind in ("factor", "dense"):
        some = [t for t in targets if t.kind == kind]
        for group in _fill(some, plan, bucket_bytes, itemsize):
            start = buckets[-1].stop if buckets else 0
            rounds = _rounds(group, plan, bucket_bytes, itemsize) if kind == "dense" else None
            buckets.append(Bucket(group, start, plan, kind, rounds))
    return buckets


def _fill(targets: Sequence[Target], plan: SlicePlan, bucket_bytes: int, itemsize: int) -> Iterator[list[Target]]:
    """Runs of targets whose buffers fit; every rank must close its buckets at the same targets."""
    pending: list[Target] = []
    for target in targets:
        if pending and _bytes_on_any_rank([*pending, target], plan, itemsize) > bucket_bytes:
            yield pending
            pending = []
        pending.append(target)
    if pending:
        yield pending


def _bytes_on_any_rank(targets: list[Target], plan: SlicePlan, itemsize: int) -> int:
    if targets[0].kind == "dense":
        return _dense_bytes(targets, [Piece(t, 0, t.shard_size) for t in targets], plan, itemsize)
    rows = [max(_rows_by_rank(t)) for t in targets]
    sent = sum(n * t.r for n, t in zip(rows, targets, strict=True)) * plan.slices_per_rank * plan.group_size
    return _factor_bytes(targets, plan, rows, sent, itemsize)


def _rows_by_rank(target: Target) -> tuple[int, ...]:
    """Rows that each rank's shard touches."""
    return _rows_of_shape(target.rows, target.cols, len(target.ranges))


@functools.cache  # a model has few shapes, and a shape up to a thousand ranks
def _rows_of_shape(rows: int, cols: int, world_size: int) -> tuple[int, ...]:
    return tuple(ShardRange.of(rank, world_size, rows, cols).rows for rank in range(world_size))


def _factor_bytes(targets: Sequence[Target], plan: SlicePlan, rows: list[int], sent: int, itemsize: int) -> int:
    """See `Bucket.buffer_bytes`; follows `exchange.FactorExchange.factors` and `optimizer` line by line.

    Args:
        rows: of each target's shard. sent: elements of B rows that go out.
    """
    A = [plan.slices * t.r * t.cols for t in targets]
    B = [plan.slices * t.r * n for n, t in zip(rows, targets, strict=True)]
    delta = sum(t.factor_numel(plan.slices_per_rank) for t in targets)
    one_B = max(B) if plan.slices > 1 else 0  # put together per target, slices side by side
    if plan.group_size == 1:
        return itemsize * (delta + one_B)
    one_A = max(A) if len(A) > 1 else 0
    received = sum(A) + sum(B)
    return itemsize * (received + max(delta + sent, one_A + one_B))


def _dense_bytes(
    targets: Sequence[Target], pieces: Sequence[Piece], plan: SlicePlan, itemsize: int, members: Sequence[int] = ()
) -> int:
    """See `Bucket.buffer_bytes`; follows `optimizer._apply_dense`. Δ is fp32 whatever the wire.

    Args:
        members: ranks whose parts are formed one by one; empty for a bound that holds on every rank alike.
    """
    size = sum(p.size for p in pieces)
    delta = 4 * sum(t.factor_numel(plan.slices_per_rank) for t in targets)
    received = itemsize * size if plan.group_size > 1 else 0
    block = max(_block_bytes(p, plan, itemsize, members) for p in pieces)
    return delta + itemsize * plan.group_size * size + max(received, block)


def _block_bytes(piece: Piece, plan: SlicePlan, itemsize: int, members: Sequence[int]) -> int:
    """One dense block of the own slices, and B and ΔB with several slices side by side."""
    target, own = piece.target, plan.slices_per_rank
    if piece.is_whole(plan):
        numel, rows = target.rows * target.cols, target.rows
    elif members:
        numel, rows = max(piece.of(m).numel for m in members), max(piece.of(m).rows for m in members)
    else:
        numel, rows = piece.size, min(target.rows, -(-piece.size // target.cols) + 1)
    return itemsize * numel + (2 * 4 * rows * own * target.r if own > 1 else 0)


def _rounds(targets: list[Target], plan: SlicePlan, bucket_bytes: int, itemsize: int) -> list[list[Piece]]:
    whole = [Piece(t, 0, t.shard_size) for t in targets]
    if len(targets) > 1 or _dense_bytes(targets, whole, plan, itemsize) <= bucket_bytes:
        return [whole]
    (target,) = targets
    own = plan.slices_per_rank
    width = 8 * own * target.r if own > 1 else 0  # bytes of a row of B and ΔB, put side by side
    # a piece of n elements touches at most n / cols + 2 rows, and needs group_size + 1 times its bytes
    room = bucket_bytes - 4 * target.factor_numel(own) - 2 * width
    size = max(target.cols, int(room / (itemsize * (plan.group_size + 1) + width / target.cols)))
    cuts = range(0, target.shard_size, size)
    return [[Piece(target, begin, min(begin + size, target.shard_size))] for begin in cuts]
