"""Integer mathematics of slices, ranks, micro-batches and shards, checked exhaustively for small numbers."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from hdpissa.engine.errors import ConfigError
from hdpissa.engine.sharding.slicing import ShardRange, SlicePlan

SIZES = range(1, 9)
DIVIDING = [(s, k) for s, k in itertools.product(SIZES, SIZES) if s % k == 0 or k % s == 0]
OTHERS = [(s, k) for s, k in itertools.product(SIZES, SIZES) if s % k and k % s]


def plans(slices: int, world: int) -> list[SlicePlan]:
    return [SlicePlan(slices, world, rank) for rank in range(world)]


@pytest.mark.parametrize(("slices", "world"), DIVIDING)
def test_ownership(slices, world):
    """Every slice is owned, by as many ranks as share it, and neighbours share."""
    of_rank = [list(plan.owned) for plan in plans(slices, world)]
    sharers = max(1, world // slices)
    assert sorted(itertools.chain.from_iterable(of_rank)) == sorted(list(range(slices)) * sharers)
    assert of_rank == sorted(of_rank), "slices must follow rank order"
    assert {len(owned) for owned in of_rank} == {max(1, slices // world)}
    for asking, asked in itertools.product(plans(slices, world), range(world)):
        assert list(asking.owned_by(asked)) == of_rank[asked]


@pytest.mark.parametrize(("slices", "world"), DIVIDING)
def test_replica_counts_the_sharers_of_a_slice(slices, world):
    by_slice: dict[int, list[int]] = {}
    for plan in plans(slices, world):
        by_slice.setdefault(plan.owned.start, []).append(plan.replica)
    assert all(found == list(range(max(1, world // slices))) for found in by_slice.values())


@pytest.mark.parametrize(("slices", "world"), DIVIDING)
def test_exchange_groups_own_every_slice_once(slices, world):
    plan, *others = plans(slices, world)
    groups = plan.exchange_groups()
    assert all(other.exchange_groups() == groups for other in others), "ranks must create groups alike"
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(world))
    for replica, group in enumerate(groups):
        assert len(group) == plan.group_size
        # in slice order without sorting: what is received lies in the order of the group
        assert [i for rank in group for i in plan.owned_by(rank)] == list(range(slices))
        assert {SlicePlan(slices, world, rank).replica for rank in group} == {replica}
        assert all(SlicePlan(slices, world, rank).group == group for rank in group)


@pytest.mark.parametrize(("slices", "world"), DIVIDING)
def test_slice_groups_share_one_slice(slices, world):
    plan, *others = plans(slices, world)
    groups = plan.slice_groups()
    assert all(other.slice_groups() == groups for other in others)
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(world))
    for group in groups:
        assert len(group) == plan.ranks_per_slice
        assert len({tuple(plan.owned_by(rank)) for rank in group}) == 1
    if slices <= world:
        assert [plan.owned_by(group[0]).start for group in groups] == list(range(slices))


@pytest.mark.parametrize("multiple", [1, 2, 3])
@pytest.mark.parametrize(("slices", "world"), DIVIDING)
def test_schedule_covers_every_micro_batch_once(slices, world, multiple):
    accumulation = multiple * max(1, slices // world)
    per_slice = accumulation * world // slices
    every = list(itertools.product(range(slices), range(per_slice)))
    done = []
    for plan in plans(slices, world):
        assert plan.micro_batches_per_slice(accumulation) == per_slice
        steps = plan.schedule(accumulation)
        assert len(steps) == accumulation, "a rank does what DeepSpeed counts"
        assert steps == sorted(steps), "slice after slice, micro-batches in the order of the slice's stream"
        done += steps
    assert sorted(done) == every


def test_sharers_take_micro_batches_in_turn():
    """K = 2·S: at any moment the sharers of a slice are at neighbouring micro-batches of its stream."""
    first, second = (SlicePlan(2, 4, rank).schedule(3) for rank in (2, 3))
    assert first == [(1, 0), (1, 2), (1, 4)]
    assert second == [(1, 1), (1, 3), (1, 5)]


def test_slices_of_a_rank_follow_one_another():
    assert SlicePlan(4, 2, 1).schedule(4) == [(2, 0), (2, 1), (3, 0), (3, 1)]


@pytest.mark.parametrize(("slices", "world"), OTHERS)
def test_refuses_what_does_not_divide(slices, world):
    with pytest.raises(ConfigError) as caught:
        SlicePlan(slices, world, 0)
    message = str(caught.value)
    assert str(slices) in message
    assert str(world) in message
    assert "\n" not in message
    offered = [int(n) for n in re.findall(r"\d+", message.split("slices = ")[1])]
    for value in offered:
        SlicePlan(value, world, 0)
    # Nothing valid that was left out is nearer than what is offered.
    valid = [s for s in range(1, 3 * world) if s % world == 0 or world % s == 0]
    farthest = max(abs(v - slices) for v in offered)
    assert len(offered) in (2, 3), "prime worlds have few neighbours"
    assert all(v in offered or abs(v - slices) >= farthest for v in valid)


def test_refusal_names_the_nearest_values():
    with pytest.raises(ConfigError, match="2 or 4 or 8"):
        SlicePlan(5, 8, 0)


def test_refuses_no_slice():
    with pytest.raises(ConfigError, match="1 or 2 or 4"):
        SlicePlan(0, 4, 0)


def test_refuses_an_accumulation_that_slices_cannot_share():
    plan = SlicePlan(8, 2, 0)
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps.*\b8\b"):
        plan.schedule(6)
    assert plan.micro_batches_per_slice(8) == 2
    # K = c·S: any accumulation will do, a slice has all of its sharers' micro-batches.
    assert SlicePlan(2, 8, 0).micro_batches_per_slice(5) == 20


# rows, cols, K: rows shared by ranks, several ranks inside one row, one column, shards that own nothing.
SHARDS = [
    *itertools.product(range(1, 7), range(1, 7), range(1, 9)),
    (20, 27, 4), (27, 20, 64), (61, 3, 64), (1, 1, 8), (3, 100, 7), (1000, 1, 6), (4, 5, 32),
]  # fmt: skip


def zero3_cut(rows: int, cols: int, world: int) -> list[list[int]]:
    """ZeRO-3's rule done literally: pad the flat matrix to equal parts, cut, drop the padding."""
    flat = torch.arange(rows * cols)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % world), value=-1)
    return [[e for e in part.tolist() if e >= 0] for part in padded.view(world, -1)]


def test_shard_ranges_follow_zero3():
    """Every element in exactly one shard, the one where ZeRO-3 puts it; the rows touched, no more, no fewer."""
    empty = 0
    for rows, cols, world in SHARDS:
        shards = [ShardRange.of(rank, world, rows, cols) for rank in range(world)]
        parts = zero3_cut(rows, cols, world)
        assert [list(range(s.start, s.stop)) for s in shards] == parts
        assert sum(s.numel for s in shards) == rows * cols
        for shard, part in zip(shards, parts, strict=True):
            touched = sorted({element // cols for element in part})
            assert list(range(shard.row_start, shard.row_stop)) == touched, (rows, cols, world)
            assert (shard.rows, shard.numel) == (len(touched), len(part))
            empty += not part
    assert empty > 100, "the sizes above must include shards that own nothing"


def test_parts_of_a_shard():
    """Pieces of every rank's shard cover it once; the last shard, which is shorter, has less in the last ones."""
    for rows, cols, world in [(9, 5, 4), (1, 5, 4), (7, 3, 2), (4, 6, 1)]:
        for rank in range(world):
            shard = ShardRange.of(rank, world, rows, cols)
            size = -(-rows * cols // world)
            for step in (1, 4, size):
                parts = [shard.part(begin, min(begin + step, size)) for begin in range(0, size, step)]
                covered = [element for part in parts for element in range(part.start, part.stop)]
                assert covered == list(range(shard.start, shard.stop))
                assert all(part.cols == cols and part.numel >= 0 for part in parts)
