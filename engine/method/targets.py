"""What is known of each weight that HD-PiSSA trains.

A `Target` is one weight matrix; two Linears that share it (tied weights) are one target.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from ..sharding.shards import Shard
from ..sharding.slicing import ShardRange, SlicePlan

# How the update of a weight travels: thin factors to every shard, or dense deltas summed on the way.
Kind = Literal["factor", "dense"]


@dataclass
class Target:
    """One trained weight.

    Attributes:
        name: module name of the first Linear that holds it.
        modules: all Linears that hold it.
        rows, cols: of the matrix as it is stored: O and I, out_features and in_features; of a Conv1D I and O.
        r: rank of one slice.  scale: lora_alpha / r, multiplies the delta.
        ranges: for each rank of the world its flat range.
        kind: chosen by `exchange.choose_kinds`.
        shard: this rank's exact values, set once the weights are in place.
        transposed: whether its modules are Conv1D.
    """

    name: str
    param: nn.Parameter
    modules: list[nn.Module]
    rows: int
    cols: int
    r: int
    scale: float
    ranges: list[ShardRange]
    kind: Kind = "factor"
    shard: Shard | None = field(default=None, repr=False)
    transposed: bool = False

    def own_range(self, plan: SlicePlan) -> ShardRange:
        """This rank's flat range."""
        return self.ranges[plan.rank]

    @property
    def shard_size(self) -> int:
        """Elements of a shard with its padding, the same on every rank; only the last shards have padding."""
        return self.ranges[0].numel

    def factor_numel(self, slices: int = 1) -> int:
        """Elements of A and B together for that many slices."""
        return slices * self.r * (self.rows + self.cols)
