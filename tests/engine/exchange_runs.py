"""What the ranks of the exchange tests do; functions here run inside `ranks.run_ranks`."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

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


def targets(world_size: int, shapes=SHAPES, scale: float = 1.0):
    """The targets without weights: the exchange looks at sizes only."""
    from hdpissa.engine.method.targets import Target
    from hdpissa.engine.sharding.slicing import ShardRange

    return [
        Target(
            name=f"t{i}",
            param=nn.Parameter(torch.empty(0)),
            modules=[],
            rows=rows,
            cols=cols,
            r=r,
            scale=scale,
            ranges=[ShardRange.of(rank, world_size, rows, cols) for rank in range(world_size)],
        )
        for i, (rows, cols, r) in enumerate(shapes)
    ]


# --- the collectives alone -------------------------------------------------------------------------


@dataclass
class Exchanged:
    """What one rank has after the exchange of all buckets for one S.

    Attributes:
        A, B_rows: by target.
        sent: bytes of the factors (all buckets), of sum_over_sharers, of sum_over_world, of reduce_to_owners.
        collectives: counted in all.
        shared, world: results of the two sums, of which rank k's part is 10ᵏ.
        reduced: this rank's row, of which rank k's part is 10ᵏ.
    """

    A: list[Tensor]
    B_rows: list[Tensor]
    sent: list[int]
    collectives: int
    shared: list[float]
    world: list[float]
    reduced: list[float]


def exchange(cases: list[int]) -> dict[int, Exchanged]:
    """The exchange for every number of slices in `cases`, in one process group."""
    dist.init_process_group("gloo")
    return {slices: _exchange(slices, dist.get_rank(), dist.get_world_size()) for slices in cases}


def _exchange(slices: int, rank: int, world_size: int) -> Exchanged:
    from hdpissa.engine.comm.buckets import Bucket
    from hdpissa.engine.comm.exchange import FactorExchange
    from hdpissa.engine.sharding.slicing import SlicePlan

    plan = SlicePlan(slices, world_size, rank)
    link = FactorExchange(plan)
    known, own = targets(world_size), slice(plan.owned.start, plan.owned.stop)
    found = Exchanged([], [], [], 0, [], [], [])

    def sent_by(call) -> Any:
        before = link.bytes_sent
        result = call()
        found.sent.append(link.bytes_sent - before)
        return result

    buckets = [Bucket([known[i] for i in indices], 0, plan) for indices in BUCKETS]
    parts = [[factors(slices, i) for i in indices] for indices in BUCKETS]
    flat = [torch.cat([x[own].flatten() for kind in (0, 1) for x in (ab[kind] for ab in some)]) for some in parts]
    received = sent_by(lambda: [link.factors(b, f) for b, f in zip(buckets, flat, strict=True)])
    found.A = [r.A(i) for r in received for i in range(len(r.bucket.targets))]
    found.B_rows = [r.B(i) for r in received for i in range(len(r.bucket.targets))]
    shared, world = (torch.tensor([10.0**rank, 1.0]) for _ in range(2))
    sent_by(lambda: link.sum_over_sharers(shared))
    sent_by(lambda: link.sum_over_world(world))
    rows = torch.arange(plan.group_size * 3.0).view(plan.group_size, 3)
    found.reduced = sent_by(lambda: link.reduce_to_owners(rows * 10.0**rank)).tolist()
    found.shared, found.world, found.collectives = shared.tolist(), world.tolist(), link.collectives
    link.reset_count()
    assert (link.bytes_sent, link.collectives) == (0, 0)
    return found


# --- whole steps on random factors, without a model -------------------------------------------------


@dataclass(frozen=True)
class StepCase:
    """One way to take a step: S, how the delta travels, and in what."""

    slices: int
    exchange: str = "auto"
    dtype: str = "fp32"
    bucket_bytes: int = 10**9
    shapes: tuple[tuple[int, int, int], ...] = tuple(SHAPES)
    second_order: bool = True
    scale: float = 1.0


@dataclass
class Stepped:
    """What one rank has after a step from W = 0.

    Attributes:
        W: this rank's shard, by target.
        kinds: by target.
        sent, collectives: counted; predicted_*: as the cost model has them.
        buffers: most bytes that were alive at any collective or kernel beside the state; predicted_buffers: what
            `buffer_bytes` says.
        factor_bytes: of the fixed factors held.
        buckets, rounds: how many.
    """

    W: list[Tensor]
    kinds: list[str]
    sent: int
    predicted_sent: int
    collectives: int
    predicted_collectives: int
    buffers: int
    predicted_buffers: int
    factor_bytes: int
    buckets: int
    rounds: int


def random_problem(case: StepCase) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Per target (A: S × R × I, B: S × O × R, grad A, grad B), fp32, the same on every rank."""
    generator = torch.Generator().manual_seed(len(case.shapes))

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    S = case.slices
    return [(some(S, r, i), some(S, o, r), some(S, r, i), some(S, o, r)) for o, i, r in case.shapes]


LR, EPS = 0.01, 0.5  # an ε of the gradients' size, so that Δ is not just their sign


def steps(cases: list[StepCase]) -> dict[StepCase, Stepped]:
    """One step of each case, in one process group."""
    dist.init_process_group("gloo")
    gc.collect()
    gc.freeze()  # what is there now is nothing that `_Watch` looks for, and would make it slow
    return {case: _step(case) for case in cases}


def _step(case: StepCase) -> Stepped:
    optimizer = _optimizer(case)
    store, exchange = optimizer.store, optimizer.exchange
    optimizer.reduce()
    assert not optimizer.vote(torch.zeros(2)).refusal
    with _Watch() as watch:
        optimizer.step()
    sent, collectives = exchange.bytes_sent, exchange.collectives
    optimizer.check_weights()
    by_name = sorted(store.targets, key=lambda t: int(t.name[1:]))
    plan = optimizer.store.plan
    return Stepped(
        W=[t.shard.read(0, t.own_range(plan).numel) for t in by_name],
        kinds=[t.kind for t in by_name],
        sent=sent,
        predicted_sent=optimizer.predicted_bytes(2),
        collectives=collectives,
        predicted_collectives=optimizer.collectives,
        buffers=watch.peak,
        predicted_buffers=optimizer.buffer_bytes,
        factor_bytes=store.nbytes_factors,
        buckets=len(store.buckets),
        rounds=sum(len(b.rounds) for b in store.buckets),
    )


def _optimizer(case: StepCase):
    """A `SliceOptimizer` with W = 0, its factors and gradients in place, nothing counted yet."""
    from hdpissa.engine.comm.buckets import make_buckets
    from hdpissa.engine.comm.exchange import FactorExchange, choose_kinds
    from hdpissa.engine.method.delta import DTYPES, DeltaRule
    from hdpissa.engine.optim.factors import FactorStore
    from hdpissa.engine.optim.optimizer import SliceOptimizer
    from hdpissa.engine.sharding.shards import DirectShard
    from hdpissa.engine.sharding.slicing import SlicePlan

    plan = SlicePlan(case.slices, dist.get_world_size(), dist.get_rank())
    known = targets(plan.world_size, case.shapes, case.scale)
    for t in known:
        W = torch.zeros(t.own_range(plan).numel)
        t.shard = DirectShard(lambda W=W: W, W)
    choose_kinds(known, plan, case.exchange)
    rule = DeltaRule(eps=EPS, second_order=case.second_order, dtype=DTYPES[case.dtype])
    store = FactorStore(plan, make_buckets(known, plan, case.bucket_bytes, rule.dtype.itemsize), torch.device("cpu"))
    exchange = FactorExchange(plan)
    own = slice(plan.owned.start, plan.owned.stop)
    problem = dict(zip([t.name for t in known], random_problem(case), strict=True))
    for bucket in store.buckets:
        A, B, grad_A, grad_B = (
            torch.cat([problem[t.name][k][own].flatten() for t in bucket.targets]) for k in range(4)
        )
        store.fill(bucket, A, B, exchange)
        # a slice is owed the mean over its micro-batches; `grad_scale` undoes this division
        store.grads[bucket.start : bucket.stop] = torch.cat([grad_A, grad_B]) / plan.slices_per_rank
    optimizer = SliceOptimizer(store, exchange, rule, lr=LR)
    exchange.reset_count()
    return optimizer


class _Watch:
    """The most bytes alive at any collective or kernel of a step beside what was there before.

    At these moments the temporaries of the torch kernels are gone, and all that the step itself allocated is there.
    """

    def __init__(self) -> None:
        self.peak = 0

    def __enter__(self):
        from hdpissa.engine.comm import exchange
        from hdpissa.kernels import api

        state = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
        self._known = {t.untyped_storage().data_ptr() for t in state}
        self._state = state  # keeps their storages from being reused
        self._saved = []
        for home, name in [
            (exchange, "_all_gather"),
            (exchange, "_reduce_scatter"),
            (dist, "all_to_all_single"),
            (api, "delta_apply_"),
            (api, "dense_delta"),
            (api, "shard_subtract_"),
        ]:
            self._saved.append((home, name, getattr(home, name)))
            setattr(home, name, self._watched(getattr(home, name)))
        return self

    def _watched(self, call):
        def watched(*args, **kwargs):
            self._look()
            result = call(*args, **kwargs)
            self._look()
            return result

        return watched

    def _look(self) -> None:
        time.sleep(0.002)  # gloo's threads let go of a finished collective's tensors a moment later
        found = [t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), Tensor)]
        alive = {s.data_ptr(): s.nbytes() for s in found if s.data_ptr() not in self._known}
        self.peak = max(self.peak, sum(alive.values()))

    def __exit__(self, *_):
        for home, name, call in self._saved:
            setattr(home, name, call)
