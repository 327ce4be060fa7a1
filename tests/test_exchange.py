"""The factor exchange on real ranks: what arrives, against the whole factors; what it cost, counted by hand."""

from __future__ import annotations

import functools

import pytest
import torch
from exchange_runs import BUCKETS, SHAPES, Exchanged, exchange, factors, targets
from ranks import run_ranks

from hdpissa.engine.slicing import SlicePlan
from hdpissa.engine.targets import make_buckets

# S = K, S = c·K, K = c·S, and S = 1, where every rank has all slices already.
SLICES = {1: [1, 3], 2: [2, 4, 1], 4: [4, 8, 2, 1]}
CASES = [(slices, world) for world, several in SLICES.items() for slices in several]
every_case = pytest.mark.parametrize(("slices", "world"), CASES)


@functools.cache  # one start of the ranks for all tests
def run(world: int) -> list[dict[int, Exchanged]]:
    return run_ranks(world, exchange, SLICES[world])


def results(slices: int, world: int) -> list[Exchanged]:
    return [of_rank[slices] for of_rank in run(world)]


def rows_of(rank: int, world: int, rows: int, cols: int) -> list[int]:
    """The rows that a rank's shard touches, by counting its elements one by one."""
    size = -(-rows * cols // world)
    return sorted({e // cols for e in range(rank * size, min((rank + 1) * size, rows * cols))})


@every_case
def test_every_rank_gets_all_of_A(slices, world):
    for found in results(slices, world):
        assert len(found.A) == len(SHAPES)
        for index, (_, cols, r) in enumerate(SHAPES):
            A, _ = factors(slices, index)
            assert torch.equal(found.A[index], A.reshape(slices * r, cols))


@every_case
def test_every_rank_gets_the_rows_of_B_that_its_shard_touches(slices, world):
    without = 0
    for rank, found in enumerate(results(slices, world)):
        for index, (rows, cols, r) in enumerate(SHAPES):
            _, B = factors(slices, index)
            side_by_side = torch.cat(list(B), dim=1)  # O × Q
            touched = rows_of(rank, world, rows, cols)
            assert found.B_rows[index].shape == (len(touched), slices * r)
            assert torch.equal(found.B_rows[index], side_by_side[touched])
            without += not touched
    assert without == (3 if world == 4 else 0), "the sizes must include ranks that own nothing"


@every_case
def test_sums(slices, world):
    """Sharers of a slice are neighbours; the world is everybody."""
    share = max(1, world // slices)
    for rank, found in enumerate(results(slices, world)):
        first = rank // share * share
        assert found.shared == [sum(10.0**k for k in range(first, first + share)), share]
        assert found.world == [sum(10.0**k for k in range(world)), world]


@every_case
def test_bytes_sent(slices, world):
    """The closed form: A goes to the G − 1 others of the group, of B each of them gets its rows, fp32."""
    share, own, group = max(1, world // slices), max(1, slices // world), min(slices, world)
    for rank, found in enumerate(results(slices, world)):
        peers = [p for p in range(world) if p % share == rank % share and p != rank]
        assert len(peers) == group - 1
        A = sum((group - 1) * own * r * cols * 4 for _, cols, r in SHAPES)
        B = sum(own * r * len(rows_of(p, world, rows, cols)) * 4 for p in peers for rows, cols, r in SHAPES)
        # two fp32 numbers in each of the sums; a ring passes 2·(G − 1)/G of them on
        assert found.sent == [A, B, 2 * (share - 1) * 8 // share, 2 * (world - 1) * 8 // world]
        # two per bucket if there is a peer, one sum over sharers, one over the world
        assert found.collectives == 2 * len(BUCKETS) * (group > 1) + (share > 1) + (world > 1)


def test_bytes_sent_in_numbers():
    """Two of the cases above with pencil and paper, so that the closed form itself is checked.

    S = K = 2. Own A of one slice: 2·5 + 1·5 + 1·2 + 3·6 = 35 numbers to one peer: 140 bytes. Rank 0 sends the
    rows of rank 1: elements 23 … 44 of 9 × 5 lie in rows 4 … 8, 3 … 4 of 1 × 5 and 1 of 1 × 2 in row 0, 12 … 23
    of 4 × 6 in rows 2 and 3: 2·5 + 1 + 1 + 3·2 = 18 numbers, 72 bytes. Rank 1 sends those of rank 0: elements
    0 … 22 lie in rows 0 … 4, the others as before: 72 bytes too.

    S = 2, K = 4: rank 0 exchanges with rank 2 only, the same 140 bytes of A. Rank 2 has elements 24 … 35 of
    9 × 5 in rows 4 … 7, 4 of 1 × 5 in row 0, none of 1 × 2, 12 … 17 of 4 × 6 in row 2: 2·4 + 1 + 0 + 3 = 12
    numbers, 48 bytes.
    """
    assert [found.sent[:2] for found in results(2, 2)] == [[140, 72], [140, 72]]
    assert results(2, 4)[0].sent[:2] == [140, 48]


@every_case
@pytest.mark.parametrize("bucket_bytes", [1, 200, 400, 600, 800, 10**6])
def test_all_ranks_make_the_same_buckets(slices, world, bucket_bytes):
    """Buckets are collectives: ranks whose shards touch fewer rows must not bundle more targets."""
    made = []
    for rank in range(world):
        plan = SlicePlan(slices, world, rank)
        buckets = make_buckets(targets(world), plan, bucket_bytes)
        made.append([[t.name for t in b.targets] for b in buckets])
        own = plan.slices_per_rank
        stop = 0
        for b in buckets:
            assert (b.start, b.stop_A) == (stop, b.start + b.numel_A)
            assert b.numel_A + b.numel_B == sum(t.factor_numel(own) for t in b.targets)
            stop = b.stop
    assert all(names == made[0] for names in made), made
    assert [name for names in made[0] for name in names] == [f"t{i}" for i in range(len(SHAPES))]
    if bucket_bytes == 1:
        assert len(made[0]) == len(SHAPES)
    if bucket_bytes == 10**6:
        assert len(made[0]) == 1
