"""What the update of an optimizer step costs on the wire: bytes by the engine's own cost model, and their time.

The kinds of traffic: factors (all-gather of ΔA, all-to-all of the rows of ΔB) or dense deltas (reduce-scatter) within
an exchange group, the gradients of a slice among the ranks that share it, and the vote. Weights of equal shape
cost the same, so everything is computed once per shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hdpissa.engine.comm import exchange
from hdpissa.engine.comm.buckets import make_buckets
from hdpissa.engine.method.targets import Target
from hdpissa.engine.sharding.slicing import SlicePlan
from hdpissa.launch.planning.hardware import Cluster

Shapes = Sequence[tuple[Target, int]]  # one target of each shape, and how many there are


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step, and their seconds."""

    sent: int
    seconds: float

    def times(self, count: int) -> Traffic:
        return Traffic(count * self.sent, count * self.seconds)


def factor(target: Target, plan: SlicePlan, cluster: Cluster, itemsize: int) -> Traffic:
    """ΔA to everybody, of ΔB to each rank the rows that its shard touches."""
    sent = exchange.factor_bytes(target, plan, itemsize)
    sent_A = itemsize * (plan.group_size - 1) * plan.slices_per_rank * target.r * target.cols
    stride = plan.ranks_per_slice
    seconds = sent_A / cluster.gather_rate(plan.group_size, stride)
    return Traffic(sent, seconds + (sent - sent_A) / cluster.exchange_rate(plan.group_size, stride))


def dense(target: Target, plan: SlicePlan, cluster: Cluster, itemsize: int) -> Traffic:
    """The delta of the own slices on the shards of the group, summed on the way, padding included."""
    sent = exchange.dense_bytes(target, plan, itemsize)
    return Traffic(sent, sent / cluster.gather_rate(plan.group_size, plan.ranks_per_slice))


def shared_slices(shapes: Shapes, plan: SlicePlan, cluster: Cluster) -> Traffic:
    """The all-reduce of the own slices' gradients among the ranks that share them."""
    nbytes = 4 * sum(count * t.factor_numel(plan.slices_per_rank) for t, count in shapes)
    share = plan.ranks_per_slice
    sent = 2 * (share - 1) * nbytes // share
    return Traffic(sent, sent / cluster.gather_rate(share))


def vote(plan: SlicePlan, cluster: Cluster) -> Traffic:
    """The all-reduce of a few float64 numbers that all ranks must agree on."""
    from hdpissa.engine.engine import TALLIES
    from hdpissa.engine.optim.optimizer import SliceOptimizer

    nbytes, world = 8 * (SliceOptimizer.OWN_BALLOT + TALLIES), plan.world_size
    sent = 2 * (world - 1) * nbytes // world
    return Traffic(sent, sent / cluster.gather_rate(world))


def norm(plan: SlicePlan, cluster: Cluster) -> Traffic:
    """The gradient norm of the one element that DeepSpeed trains: a float64, all-reduced in its own step."""
    sent = 2 * (plan.world_size - 1) * 8 // plan.world_size
    return Traffic(sent, sent / cluster.gather_rate(plan.world_size))


def update(shapes: Shapes, plan: SlicePlan, cluster: Cluster, itemsize: int) -> dict[str, Traffic]:
    """All traffic of an update, by kind; targets know theirs."""

    def total(kind: str, cost) -> Traffic:
        parts = [cost(t, plan, cluster, itemsize).times(count) for t, count in shapes if t.kind == kind]
        return Traffic(sum(p.sent for p in parts), sum(p.seconds for p in parts))

    return {
        "factor exchange": total("factor", factor),
        "dense reduce-scatter": total("dense", dense),
        "shared slices": shared_slices(shapes, plan, cluster),
        "vote": vote(plan, cluster),
    }


def buffer_bytes(targets: Sequence[Target], plan: SlicePlan, bucket_bytes: int, itemsize: int) -> int:
    """Buffers of the largest bucket, as the engine fills them."""
    return max(bucket.buffer_bytes(itemsize) for bucket in make_buckets(targets, plan, bucket_bytes, itemsize))
