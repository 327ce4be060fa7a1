"""The exchange on real ranks: what arrives, against the whole factors; what it cost, counted by hand and predicted;

whole steps on random factors against float64, by either way and in either dtype.
"""

from __future__ import annotations

import functools

import pytest
import torch
from exchange_runs import (
    BUCKETS,
    EPS,
    LR,
    SHAPES,
    Exchanged,
    StepCase,
    Stepped,
    exchange,
    factors,
    random_problem,
    steps,
    targets,
)
from ranks import run_ranks

from hdpissa.engine.comm.buckets import make_buckets
from hdpissa.engine.comm.exchange import choose_kinds, dense_bytes, factor_bytes, predicted_bytes
from hdpissa.engine.sharding.slicing import SlicePlan
from hdpissa.kernels import api as kernels

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
def test_reduced_row(slices, world):
    """Row g of the sum over the exchange group goes to its g-th member; others send nothing to it."""
    share, group = max(1, world // slices), min(slices, world)
    for rank, found in enumerate(results(slices, world)):
        members = [p for p in range(world) if p % share == rank % share]
        factor = sum(10.0**p for p in members)
        at = 3 * members.index(rank)
        assert len(members) == group
        assert found.reduced == [x * factor for x in (at, at + 1, at + 2)]


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
        reduced = (group - 1) * 3 * 4
        assert found.sent == [A + B, 2 * (share - 1) * 8 // share, 2 * (world - 1) * 8 // world, reduced]
        # two per bucket if there is a peer, one sum over sharers, one over the world, one reduction
        assert found.collectives == (2 * len(BUCKETS) + 1) * (group > 1) + (share > 1) + (world > 1)


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
    assert [found.sent[0] for found in results(2, 2)] == [140 + 72, 140 + 72]
    assert results(2, 4)[0].sent[0] == 140 + 48


@every_case
@pytest.mark.parametrize("kinds", ["factor", "dense", "mixed"])
@pytest.mark.parametrize("bucket_bytes", [1, 200, 400, 600, 800, 10**6])
def test_all_ranks_make_the_same_buckets(slices, world, kinds, bucket_bytes):
    """Buckets are collectives: ranks whose shards touch fewer rows must not bundle more targets."""
    made = []
    for rank in range(world):
        plan = SlicePlan(slices, world, rank)
        known = targets(world)
        for t, mixed in zip(known, ("factor", "dense", "dense", "factor"), strict=True):
            t.kind = mixed if kinds == "mixed" else kinds
        buckets = make_buckets(known, plan, bucket_bytes)
        made.append([[(p.target.name, p.begin, p.end) for p in r] for b in buckets for r in b.rounds])
        made[-1].append([[t.name for t in b.targets] for b in buckets])
        own = plan.slices_per_rank
        stop = 0
        for b in buckets:
            assert (b.start, b.stop_A) == (stop, b.start + b.numel_A)
            assert b.numel_A + b.numel_B == sum(t.factor_numel(own) for t in b.targets)
            stop = b.stop
            covered = {t.name: 0 for t in b.targets if b.kind == "dense"}
            for piece in (p for r in b.rounds for p in r):
                assert piece.begin == covered[piece.target.name], "no gap, no overlap"
                covered[piece.target.name] = piece.end
            assert covered == {t.name: t.shard_size for t in b.targets if b.kind == "dense"}
    assert all(names == made[0] for names in made), made
    names = [name for names in made[0][-1] for name in names]
    assert names == (["t0", "t3", "t1", "t2"] if kinds == "mixed" else ["t0", "t1", "t2", "t3"])
    if bucket_bytes == 1:
        assert len(made[0][-1]) == len(SHAPES)
    if bucket_bytes == 10**6:
        assert len(made[0][-1]) == 1 + (kinds == "mixed")


# --- whole steps -------------------------------------------------------------------------------------------

# One that auto sends dense (S·r = 8 of 8 rows, at S = 4), one that is large enough to go in several rounds.
STEP_SHAPES = (*SHAPES, (8, 16, 2), (24, 40, 4))
WIDE = ((96, 64, 8),)  # enough numbers for the statistics of rounding
WAYS = [("auto", "fp32"), ("factor", "fp32"), ("dense", "fp32"), ("factor", "bf16"), ("dense", "bf16")]


def step_cases(world: int) -> list[StepCase]:
    shapes = {"shapes": STEP_SHAPES}
    several = [StepCase(slices, way, dtype, **shapes) for slices in SLICES[world] for way, dtype in WAYS]
    small = [
        StepCase(slices, way, bucket_bytes=12_000, **shapes) for slices in SLICES[world] for way in ("auto", "dense")
    ]
    tiny = [StepCase(4 if world > 1 else 3, way, bucket_bytes=1, **shapes) for way in ("factor", "dense")]
    more = [StepCase(world, way, second_order=False, scale=0.5, **shapes) for way in ("factor", "dense")]
    wide = [StepCase(max(world, 2), way, "bf16", shapes=WIDE) for way in ("factor", "dense")]
    return [*several, *small, *tiny, *more, *wide]


@functools.cache
def run_steps(world: int) -> list[dict[StepCase, Stepped]]:
    return run_ranks(world, steps, step_cases(world))


STEPS = [(world, case) for world in SLICES for case in step_cases(world)]


def name_of(value) -> str | int:
    if isinstance(value, int):
        return value
    order = "" if value.second_order else "-first_order"
    return f"{value.slices}-{value.exchange}-{value.dtype}-{value.bucket_bytes}-{len(value.shapes)}{order}"


every_step = pytest.mark.parametrize(("world", "case"), STEPS, ids=name_of)


def stepped(world: int, case: StepCase) -> list[Stepped]:
    return [of_rank[case] for of_rank in run_steps(world)]


def exact_deltas(case: StepCase) -> list[list[tuple[torch.Tensor, ...]]]:
    """Per target and slice (A, B, ΔA, ΔB) in float64."""

    def adam(grad):
        grad = grad.double()
        m, v = torch.zeros_like(grad), torch.zeros_like(grad)
        return kernels.slice_adam_(m, v, grad, step=1, lr=LR, betas=(0.9, 0.999), eps=EPS)

    return [
        [(A[i].double(), B[i].double(), adam(gA[i]), adam(gB[i])) for i in range(case.slices)]
        for A, B, gA, gB in random_problem(case)
    ]


def dense_of(factors, case: StepCase) -> torch.Tensor:
    """A slice's change of W, line by line."""
    A, B, dA, dB = factors
    return dB @ A + B @ dA - (dB @ dA if case.second_order else 0)


def whole(world: int, case: StepCase) -> list[torch.Tensor]:
    """W of every target after the step, put together from the ranks' shards."""
    shards = zip(*(found.W for found in stepped(world, case)), strict=True)
    return [torch.cat(parts).view(o, i) for parts, (o, i, _) in zip(shards, case.shapes, strict=True)]


@every_step
def test_step_against_float64(world, case):
    """fp32 on the wire: products and sums of at most Q = 32 terms in fp32. bf16: see the argued bounds below."""
    for W, slices in zip(whole(world, case), exact_deltas(case), strict=True):
        expected = -case.scale * sum(dense_of(s, case) for s in slices)
        limit = 1e-6 if case.dtype == "fp32" else bf16_bound(world, case, slices)
        assert (W - expected).norm() <= limit * expected.norm()


def bf16_bound(world: int, case: StepCase, slices) -> float:
    """Largest relative error of the summed delta, with u = 2⁻⁸, half a bf16 unit.

    Factors: ΔA and ΔB are off by u of themselves, so ΔB A + B ΔA − ΔB ΔA by u (|ΔB||A| + |B||ΔA| + 2|ΔB||ΔA|).
    Dense: each of the G ranks' deltas D_k is rounded once, and each of the G − 1 sums on the way again:
    u G Σ|D_k| in all. The last term is for u² and fp32.
    """
    u, total = 2**-8, sum(dense_of(s, case) for s in slices).norm()
    if case.exchange == "factor" or (min(world, case.slices) == 1 and case.exchange == "auto"):
        off = sum(dB.abs() @ A.abs() + B.abs() @ dA.abs() + 2 * dB.abs() @ dA.abs() for A, B, dA, dB in slices)
    else:
        group, own = min(world, case.slices), max(1, case.slices // world)
        ranks = [sum(dense_of(s, case) for s in slices[k * own : (k + 1) * own]) for k in range(group)]
        off = group * sum(D.abs() for D in ranks)
    return (u * off.norm() / total).item() * 1.02 + 1e-6


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("exchange", ["factor", "dense"])
def test_error_of_bf16_on_the_wire(world, exchange):
    """The figures that README gives; sharper than the bound above, for roundings that are independent of each other.

    A rounding to bf16 is off by at most u = 2⁻⁸ of the number, evenly spread, hence by u/√3 in the mean square at
    most (1.7e-3 over all mantissas). Of the factors' roundings each term of the delta feels one. A dense delta feels
    its own and those of the G − 1 sums on the way, none larger than the last: √G times as much.
    """
    case = StepCase(world, exchange, "bf16", shapes=WIDE)
    (W,), (slices,) = whole(world, case), exact_deltas(case)
    expected = -sum(dense_of(s, case) for s in slices)
    error = ((W - expected).norm() / expected.norm()).item()
    print(f"{exchange}, {world} ranks: {error:.2e}")
    limit = 2**-8 / 3**0.5 * (world**0.5 if exchange == "dense" else 1)
    assert 0.5 * limit < error < limit


@every_step
def test_bytes_and_collectives_are_predicted(world, case):
    """Counted on every rank from what was really passed to the collectives, against the shapes alone."""
    for found in stepped(world, case):
        assert found.sent == found.predicted_sent
        assert found.collectives == found.predicted_collectives


@every_step
def test_buffers_are_bounded_and_counted(world, case):
    """What a step allocates is what `memory_bytes` says, and within bucket_bytes where one target fits into it.

    Up to 2 %: a matrix of one row needs no copy to put slices side by side.
    """
    for found in stepped(world, case):
        assert 0.98 * found.predicted_buffers <= found.buffers <= found.predicted_buffers
        if case.bucket_bytes > 1:
            assert found.predicted_buffers <= case.bucket_bytes
        else:
            assert found.buckets == len(case.shapes)


@every_step
def test_dense_targets_keep_the_own_factors_only(world, case):
    """A and B of the own slices; for factor exchange A of all slices, and their rows of B beside the own B."""
    own = max(1, case.slices // world)
    for rank, found in enumerate(stepped(world, case)):
        expected = 0
        for kind, (o, i, r) in zip(found.kinds, case.shapes, strict=True):
            rows = len(rows_of(rank, world, o, i))
            expected += own * r * o + (own * r * i if kind == "dense" else case.slices * r * (i + rows))
        assert found.factor_bytes == 4 * expected


@pytest.mark.parametrize(("slices", "world"), [(s, w) for s, w in CASES if w > 1 and s > 1])
def test_dense_bytes_in_closed_form(slices, world):
    """Each rank passes the parts of its G − 1 peers on: padded shards of ⌈rows · cols / K⌉ elements."""
    share, group = max(1, world // slices), min(slices, world)
    vote = 2 * (world - 1) * 8 * 5 // world
    sharers = 2 * (share - 1) * 4 * sum(r * (o + i) for o, i, r in STEP_SHAPES) // share
    for dtype, width in (("fp32", 4), ("bf16", 2)):
        for found in stepped(world, StepCase(slices, "dense", dtype, shapes=STEP_SHAPES)):
            dense = sum((group - 1) * -(-o * i // world) * width for o, i, _ in STEP_SHAPES)
            assert found.sent == dense + vote + sharers
            assert found.collectives == 1 + 1 + (share > 1)


def test_a_large_matrix_goes_in_rounds():
    """In small buckets, and with nothing but one row at a time; W is the same but for the order of fp32 products."""
    whole_at_once = StepCase(4, "dense", shapes=STEP_SHAPES)
    for bucket_bytes, fewest in ((12_000, 2), (1, 20)):
        case = StepCase(4, "dense", bucket_bytes=bucket_bytes, shapes=STEP_SHAPES)
        assert stepped(2, case)[0].rounds >= fewest
        for W, expected in zip(whole(2, case), whole(2, whole_at_once), strict=True):
            assert (W - expected).norm() <= 1e-6 * expected.norm()
    assert stepped(2, whole_at_once)[0].rounds == 1


@pytest.mark.parametrize("slices", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_auto_sends_fewer_bytes(slices, world):
    """Per target, summed over all ranks; factors where there is no difference, or nobody to send to."""
    if max(slices, world) % min(slices, world):
        return
    plans = [SlicePlan(slices, world, rank) for rank in range(world)]
    known = targets(world, [(o, i, r) for o in (1, 4, 9, 16, 64) for i in (2, 5, 16, 48) for r in (1, 2, 3)])
    chosen = []
    for plan in plans:
        choose_kinds(known, plan, "auto")
        chosen.append([t.kind for t in known])
    assert all(kinds == chosen[0] for kinds in chosen)
    for t, kind in zip(known, chosen[0], strict=True):
        by_factors, by_dense = (sum(cost(t, plan, 4) for plan in plans) for cost in (factor_bytes, dense_bytes))
        assert kind == ("dense" if by_dense < by_factors else "factor")
    if min(slices, world) > 1:
        assert set(chosen[0]) == {"factor", "dense"}
    for wanted in ("factor", "dense"):
        choose_kinds(known, plans[0], wanted)
        assert {t.kind for t in known} == {wanted}


def test_a_tie_goes_to_factors():
    """4 × 2 at r = 1 over two ranks: 2 · 4 elements of dense halves, or 2 · 2 of A and 4 rows of B."""
    (tied,) = known = targets(2, [(4, 2, 1)])
    plan = SlicePlan(2, 2, 0)
    assert sum(factor_bytes(tied, SlicePlan(2, 2, k), 4) for k in (0, 1)) == 2 * dense_bytes(tied, plan, 4) == 32
    choose_kinds(known, plan, "auto")
    assert tied.kind == "factor"
    assert predicted_bytes(known, plan, 4, ballot=0) == 16
