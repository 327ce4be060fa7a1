"""What the ranks of the exchange tests do; functions here run inside `ranks.run_ranks`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

# rows, cols, r. ZeRO-3 cuts the first in the middle of rows; over 4 ranks the second has a rank that owns
# nothing and the third two; the fourth fits into one row per rank.
SHAPES = [(9, 5, 2), (1, 5, 1), (1, 2, 1), (4, 6, 3)]
# Which targets travel together: a bucket of several, and one alone, where views replace copies.
BUCKETS = [[0, 1, 2], [3]]


def factors(slices: int, index: int) -> tuple[Tensor, Tensor]:
    """(A: S × R × I, B: S × O × R) of a target, every number different and exact in fp32."""
    rows, cols, r = SHAPES[index]
    A = torch.arange(slices * r * cols, dtype=torch.float32).view(slices, r, cols) + 10_000 * index
    B = torch.arange(slices * rows * r, dtype=torch.float32).view(slices, rows, r) + 10_000 * index + 5_000
    return A, -B


def targets(world_size: int):
    """The targets without weights: the exchange looks at sizes only."""
    from hdpissa.engine.slicing import ShardRange
    from hdpissa.engine.targets import Target

    return [
        Target(
            name=f"t{i}",
            param=nn.Parameter(torch.empty(0)),
            modules=[],
            rows=rows,
            cols=cols,
            r=r,
            scale=1.0,
            ranges=[ShardRange.of(rank, world_size, rows, cols) for rank in range(world_size)],
        )
        for i, (rows, cols, r) in enumerate(SHAPES)
    ]


@dataclass
class Exchanged:
    """What one rank has after the exchange of all buckets for one S.

    Attributes:
        A, B_rows: by target.
        sent: bytes of gather_A, of rows_to_owners (all buckets), of sum_over_sharers, of sum_over_world.
        collectives: counted in all.
        shared, world: results of the two sums, of which rank k's part is 10ᵏ.
    """

    A: list[Tensor]
    B_rows: list[Tensor]
    sent: list[int]
    collectives: int
    shared: list[float]
    world: list[float]


def exchange(cases: list[int]) -> dict[int, Exchanged]:
    """The exchange for every number of slices in `cases`, in one process group."""
    dist.init_process_group("gloo")
    return {slices: _exchange(slices, dist.get_rank(), dist.get_world_size()) for slices in cases}


def _exchange(slices: int, rank: int, world_size: int) -> Exchanged:
    from hdpissa.engine.exchange import FactorExchange
    from hdpissa.engine.slicing import SlicePlan
    from hdpissa.engine.targets import Bucket

    plan = SlicePlan(slices, world_size, rank)
    link = FactorExchange(plan)
    known, own = targets(world_size), slice(plan.owned.start, plan.owned.stop)
    found = Exchanged([], [], [], 0, [], [])

    def sent_by(call) -> None:
        before = link.bytes_sent
        call()
        found.sent.append(link.bytes_sent - before)

    buckets = [Bucket([known[i] for i in indices], 0, plan) for indices in BUCKETS]
    parts = [[factors(slices, i) for i in indices] for indices in BUCKETS]
    own_A = [torch.cat([A[own].flatten() for A, _ in several]) for several in parts]
    own_B = [torch.cat([B[own].flatten() for _, B in several]) for several in parts]
    shared, world = (torch.tensor([10.0**rank, 1.0]) for _ in range(2))
    gathered = [found.A.extend, found.B_rows.extend]
    sent_by(lambda: [gathered[0](link.gather_A(b, a)) for b, a in zip(buckets, own_A, strict=True)])
    sent_by(lambda: [gathered[1](link.rows_to_owners(b, a)) for b, a in zip(buckets, own_B, strict=True)])
    sent_by(lambda: link.sum_over_sharers(shared))
    sent_by(lambda: link.sum_over_world(world))
    found.shared, found.world, found.collectives = shared.tolist(), world.tolist(), link.collectives
    link.reset_count()
    assert (link.bytes_sent, link.collectives) == (0, 0)
    return found
