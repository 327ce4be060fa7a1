"""What is known of each weight that HD-PiSSA trains, and how these weights are bundled.

A `Target` is one weight matrix; two Linears that share it (tied weights) are one target. A
`Bucket` is a run of targets whose factors cross the network together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from .shards import Shard
from .slicing import ShardRange, SlicePlan


@dataclass
class Target:
    """One trained weight.

    Attributes:
        name: module name of the first Linear that holds it.
        modules: all Linears that hold it.
        rows: O, out_features.  cols: I, in_features.
        r: rank of one slice.  scale: lora_alpha / r, multiplies the delta.
        ranges: for each rank of the world its flat range.
        shard: this rank's exact values, set once the weights are in place.
    """

    name: str
    param: nn.Parameter
    modules: list[nn.Module]
    rows: int
    cols: int
    r: int
    scale: float
    ranges: list[ShardRange]
    shard: Shard | None = field(default=None, repr=False)

    def own_range(self, plan: SlicePlan) -> ShardRange:
        """This rank's flat range."""
        return self.ranges[plan.rank]

    def factor_numel(self, slices: int = 1) -> int:
        """Elements of A and B together for that many slices."""
        return slices * self.r * (self.rows + self.cols)


@dataclass
class Bucket:
    """Targets whose factors travel together, and where they lie in the rank's flat buffers.

    The flat layout of a bucket is [A of every target][B of every target], own slices innermost-first:
    A of a target is (own slices × R × I), B is (own slices × O × R), both row-major.
    """

    targets: list[Target]
    start: int
    plan: SlicePlan

    def __post_init__(self) -> None:
        own = self.plan.slices_per_rank
        self.numel_A = sum(own * t.r * t.cols for t in self.targets)
        self.numel_B = sum(own * t.r * t.rows for t in self.targets)
        self.stop = self.start + self.numel_A + self.numel_B

    @property
    def stop_A(self) -> int:
        """End of the A part, start of the B part, in the rank's flat buffers."""
        return self.start + self.numel_A


def make_buckets(targets: Sequence[Target], plan: SlicePlan, bucket_bytes: int) -> list[Bucket]:
    """Fills buckets in order, each up to `bucket_bytes` of received factors (fp32), at least one target."""
    buckets: list[Bucket] = []
    pending: list[Target] = []
    room = bucket_bytes
    start = 0

    def close() -> None:
        nonlocal start
        buckets.append(Bucket(list(pending), start, plan))
        start = buckets[-1].stop
        pending.clear()

    for target in targets:
        # The widest shard of all ranks, not this rank's: every rank must close its buckets at the same targets.
        widest = max(owned.rows for owned in target.ranges)
        received = 4 * plan.slices * target.r * (target.cols + widest)
        if pending and received > room:
            close()
            room = bucket_bytes
        pending.append(target)
        room -= received
    if pending:
        close()
    return buckets
