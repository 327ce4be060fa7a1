"""The slices of every target: decomposed once, by one rank each, and scattered to those who train them.

Every rank holds slices of the *same* decomposition, and none but the one that works on a matrix ever sees it whole.
"rank0" lets rank 0 do all matrices; "round_robin" deals them out, K at a time, and gives the same slices. Either way
it is a pipeline: while a matrix is decomposed, the shards of the next are on their way in and the slices of the one
before on their way out. A rank needs for it, besides the factors, two matrices (one at work, one arriving),
the workspace of `svd`, and one matrix's slices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import consensus
from ..comm.buckets import Bucket
from ..comm.exchange import FactorExchange
from ..distributed import heartbeat
from ..errors import ConfigError, one_line
from ..method.targets import Target
from ..optim.factors import FactorStore
from ..sharding import zero3
from ..sharding.slicing import SlicePlan
from . import svd
from .slice_cache import SliceCache

logger = logging.getLogger(__name__)
_Slices = tuple[Tensor, Tensor, float]  # own A and B of a target, flat, and the residual

# How far cached slices may be from the weights: what was reached when they were computed, but at least the rounding of
# a float32 product with W (3e-7 measured at 576 × 1536), times the slack between one random z and the worst triplet.
ROUNDING, SLACK = 3e-6, 3


@dataclass(frozen=True)
class InitReport:
    """What the decomposition reached: the largest residual over all targets, and where; was it read from a cache."""

    residual: float = 0.0
    worst: str = ""
    cached: bool = False


def compute_slices(
    store: FactorStore,
    exchange: FactorExchange,
    *,
    method: str,
    tol: float,
    placement: str = "rank0",
    cache: SliceCache | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> InitReport:
    """Fills the store with the own slices of every target; collective.

    Args:
        placement: "rank0" or "round_robin".
        cache: where slices are kept between runs; what it has and what fits the weights is not computed again.
        progress: called with each target's name when its slices are there, how many are, and of how many.

    Raises:
        ConfigError: on every rank alike, when a matrix cannot be decomposed.
    """
    if cache is not None:
        read = _from_cache(cache, store)
        if read is not None:
            for bucket, own in zip(store.buckets, read, strict=True):
                heartbeat.beat("start.slices", slow=True)
                store.fill(bucket, own.A, own.B, exchange)
            for done, target in enumerate(store.targets, 1):
                progress(target.name, done, len(store.targets))
            return InitReport(*cache.reached(), cached=True)
    pipeline = _Pipeline(store.targets, store.plan, method=method, tol=tol, placement=placement, cache=cache)
    report = _worst(_fill(store, exchange, pipeline.run(), progress))
    if cache is not None and store.plan.rank == 0:  # after `_worst`, hence after every rank's last file
        try:
            cache.finish(report.residual, report.worst)
        except OSError as error:  # the slices are there; the next start computes them again
            logger.warning("slice cache %s: %s; it stays incomplete", cache.folder, one_line(error))
    return report


def _worst(mine: InitReport) -> InitReport:
    """The report with the largest residual of all ranks, on all ranks."""
    return max(consensus.gather(mine), key=lambda report: report.residual)


class _Own:
    """A bucket's own slices, as the store takes them: A (numel_A) and B (numel_B), flat; views of them per target."""

    def __init__(self, bucket: Bucket) -> None:
        self.A, self.B = (torch.empty(n, device=zero3.device()) for n in (bucket.numel_A, bucket.numel_B))
        views = zip(bucket.targets, bucket.views_A(self.A), bucket.views_B(self.B), strict=True)
        self.parts = [(t, A.view(-1, t.r, t.cols), B) for t, A, B in views]


def _fill(
    store: FactorStore, exchange: FactorExchange, own: Iterator[_Slices], progress: Callable[[str, int, int], None]
) -> InitReport:
    """Hands own slices, flat (A, B, residual) per target in order, to the store bucket by bucket."""
    report, done = InitReport(), 0
    for bucket in store.buckets:
        into = _Own(bucket)
        for target, A_SRI, B_SOR in into.parts:
            heartbeat.beat("start.slices", slow=True)
            A, B, residual = next(own)
            A_SRI.copy_(A.view_as(A_SRI))
            B_SOR.copy_(B.view_as(B_SOR))
            if residual > report.residual:
                report = InitReport(residual, target.name)
            done += 1
            progress(target.name, done, len(store.targets))
        store.fill(bucket, into.A, into.B, exchange)
    return report


# --- the cache --------------------------------------------------------------------------------------


def _from_cache(cache: SliceCache, store: FactorStore) -> list[_Own] | None:
    """The own slices, if every rank could read its own and they fit the weights; else None, with a line in the log."""
    problem, own = cache.problem(), []
    for bucket in store.buckets if problem is None else []:
        own.append(_Own(bucket))
        for target, A_SRI, B_SOR in own[-1].parts:
            problem = problem or cache.read(target.name, store.plan.owned, A_SRI, B_SOR)
    problem = consensus.first(problem)
    if problem is None:
        residual = _misfit([part for bucket in own for part in bucket.parts], store.plan)
        foreign = f"its slices are not those of these weights (relative residual {residual:.1e})"
        limit = SLACK * max(cache.reached()[0], ROUNDING)
        problem = consensus.first(None if residual <= limit else foreign)  # a float may differ from rank to rank
    if problem is None:
        return own
    if store.plan.rank == 0:
        level = logging.INFO if problem == SliceCache.EMPTY else logging.WARNING
        logger.log(level, "slice cache %s: %s; the weights are decomposed", cache.folder, problem)
    return None


def _misfit(own: Sequence[tuple[Target, Tensor, Tensor]], plan: SlicePlan) -> float:
    """Largest ‖W Aᵀ z − B (σ ∘ z)‖ / ‖B (σ ∘ z)‖ over the targets, for one random z each; collective.

    With A = √σ Vᵀ and B = U √σ the two agree for all z exactly when W v = σ u for every triplet, so one product
    with each shard detects slices of other weights, and damaged ones, to the tolerance they were accepted with.
    """
    generator = torch.Generator().manual_seed(0)
    device = zero3.device()
    targets, inputs, expected = [t for t, _, _ in own], [], []
    for t, A_SRI, B_SOR in own:
        z_SR = torch.randn(plan.slices, t.r, generator=generator)[plan.owned.start : plan.owned.stop].to(device)
        sigma_SR = torch.linalg.vector_norm(A_SRI, dim=-1).square()
        inputs.append(z_SR.flatten() @ A_SRI.flatten(0, 1))
        expected.append((B_SOR @ (sigma_SR * z_SR)[:, :, None]).sum((0, 2)))
    summed = torch.cat([*inputs, *expected]) / plan.ranks_per_slice  # sharers of a slice hold it twice
    dist.all_reduce(summed)
    inputs, expected = (
        list(part.split(sizes))
        for part, sizes in zip(
            summed.split([sum(t.cols for t in targets), sum(t.rows for t in targets)]),
            ([t.cols for t in targets], [t.rows for t in targets]),
            strict=True,
        )
    )
    found = torch.cat([_own_rows_times(t, a, plan) for t, a in zip(targets, inputs, strict=True)])
    dist.all_reduce(found)
    parts = found.split([t.rows for t in targets])
    tiny = torch.finfo(torch.float32).tiny  # a weight of zeros has slices of zeros
    misfits = [(f - b).norm() / b.norm().clamp(min=tiny) for f, b in zip(parts, expected, strict=True)]
    return torch.stack(misfits).amax().item()


def _own_rows_times(target: Target, a_I: Tensor, plan: SlicePlan) -> Tensor:
    """W a (O) with zeros for all elements of W that other ranks own.

    In up to three parts, what is left of a row, whole rows, the beginning of a row: W is read and not copied, and all
    weights are read once in this way at every start from a cache.
    """
    assert target.shard is not None
    owned, cols = target.own_range(plan), target.cols
    result = a_I.new_zeros(target.rows)
    values = target.shard.read(0, owned.numel).to(a_I.device)
    first = min(-owned.start % cols, owned.numel)
    rows = (owned.numel - first) // cols
    row, column = divmod(owned.start, cols)
    if first:
        result[row] = values[:first] @ a_I[column : column + first]
        row += 1
    result[row : row + rows] = values[first : first + rows * cols].view(rows, cols) @ a_I
    if last := owned.numel - first - rows * cols:
        result[row + rows] = values[-last:] @ a_I[:last]
    return result


# --- the pipeline -----------------------------------------------------------------------------------


@dataclass
class _Arriving:
    """A matrix on its way to the rank that decomposes it. `whole` is there on that rank only."""

    target: Target
    owner: int
    whole: Tensor | None
    part: Tensor  # kept alive until it is sent
    work: Any


@dataclass
class _Leaving:
    """One matrix's slices on their way to the ranks. `residual` is known to the owner only."""

    target: Target
    received: Tensor
    parts: list[Tensor] | None  # kept alive until they are sent
    residual: float
    work: Any


class _Pipeline:
    """Gathers, decomposes and scatters wave by wave; a wave has one matrix, or one per rank."""

    def __init__(
        self,
        targets: Sequence[Target],
        plan: SlicePlan,
        *,
        method: str,
        tol: float,
        placement: str,
        cache: SliceCache | None,
    ) -> None:
        self.plan, self.method, self.tol, self.cache = plan, method, tol, cache
        width = plan.world_size if placement == "round_robin" else 1
        self.waves = [list(targets[i : i + width]) for i in range(0, len(targets), width)]
        self.width = width

    def run(self) -> Iterator[_Slices]:
        """Yields (A, B, residual) of the own slices, target by target; every rank must draw all of them."""
        leaving: list[_Leaving] = []
        arriving = self._gather(0)
        for wave in range(len(self.waves)):
            matrices = [self._arrived(a) for a in arriving]
            arriving = self._gather(wave + 1)
            parts, residual, problem = self._decompose(wave, matrices)
            if (problem := consensus.first(problem)) is not None:
                raise ConfigError(problem)
            del matrices
            yield from map(self._received, leaving)
            leaving = self._scatter(wave, parts, residual)
        yield from map(self._received, leaving)

    def _gather(self, wave: int) -> list[_Arriving]:
        if wave == len(self.waves):
            return []
        return [self._send_shard(target, owner) for owner, target in enumerate(self.waves[wave])]

    def _send_shard(self, target: Target, owner: int) -> _Arriving:
        assert target.shard is not None
        plan, device, owned = self.plan, zero3.device(), target.own_range(self.plan)
        part = torch.zeros(target.shard_size, device=device)
        part[: owned.numel].copy_(target.shard.read(0, owned.numel))
        whole = torch.empty(plan.world_size, target.shard_size, device=device) if plan.rank == owner else None
        into = None if whole is None else list(whole.unbind(0))
        return _Arriving(target, owner, whole, part, dist.gather(part, into, dst=owner, async_op=True))

    def _arrived(self, arriving: _Arriving) -> Tensor | None:
        arriving.work.wait()
        if arriving.whole is None:
            return None
        rows, cols = arriving.target.rows, arriving.target.cols
        return arriving.whole.view(-1)[: rows * cols].view(rows, cols)

    def _decompose(self, wave: int, matrices: list[Tensor | None]) -> tuple[list[Tensor] | None, float, str | None]:
        """(parts for every rank, residual, problem) of this rank's matrix of the wave, if it has one."""
        for target, W_OI in zip(self.waves[wave], matrices, strict=True):
            if W_OI is None:
                continue
            try:
                triplets = svd.top_triplets(W_OI, self.plan.slices * target.r, method=self.method, tol=self.tol)
                A_SRI, B_SOR = svd.slice_factors(triplets, target.r)
                if self.cache is not None:
                    self.cache.write(target.name, A_SRI, B_SOR)
                return self._parts_by_rank(A_SRI, B_SOR), triplets.residual, None
            except torch.OutOfMemoryError:
                return None, 0.0, f"{target.name}: no memory left to decompose it; free some, or offload parameters"
            except OSError as error:
                return None, 0.0, f"hd_pissa.init.cache_dir: {one_line(error)}; give a folder with room, or null"
            except (ValueError, torch.linalg.LinAlgError) as error:  # not finite, or LAPACK did not converge
                advice = "leave it out with hd_pissa.exclude_modules or fix the weights"
                return None, 0.0, f"{target.name}: {error}; {advice}"
        return None, 0.0, None

    def _parts_by_rank(self, A_SRI: Tensor, B_SOR: Tensor) -> list[Tensor]:
        """For each rank its own slices' A and B, flat, one behind the other."""
        owned = [self.plan.owned_by(rank) for rank in range(self.plan.world_size)]
        return [torch.cat([A_SRI[o.start : o.stop].flatten(), B_SOR[o.start : o.stop].flatten()]) for o in owned]

    def _scatter(self, wave: int, parts: list[Tensor] | None, residual: float) -> list[_Leaving]:
        leaving = []
        for owner, target in enumerate(self.waves[wave]):
            received = torch.empty(target.factor_numel(self.plan.slices_per_rank), device=zero3.device())
            mine = parts if self.plan.rank == owner else None
            work = dist.scatter(received, mine, src=owner, async_op=True)
            leaving.append(_Leaving(target, received, mine, residual if mine else 0.0, work))
        return leaving

    def _received(self, leaving: _Leaving) -> _Slices:
        leaving.work.wait()
        A, B = leaving.received.split(
            [self.plan.slices_per_rank * leaving.target.r * n for n in (leaving.target.cols, leaving.target.rows)]
        )
        return A, B, leaving.residual
