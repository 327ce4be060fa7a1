"""Which slice lives on which rank, which micro-batch feeds which slice, which rows a shard covers.

Pure integer mathematics: no tensors, no process groups. The number of slices S is
a hyper-parameter of the method and the world size K is a resource, so one run
means the same at any K (method.md, "Slices are not ranks"):

* S = c·K: rank k owns slices k·c … k·c + c − 1 and works them off one after another.
* K = c·S: ranks i·c … i·c + c − 1 share slice i and take its micro-batches in turn.

Ranks that share a slice are neighbours, so that on one node they average their
gradients over the fast links.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class SlicePlan:
    """The place of one rank among S slices and K ranks.

    Raises `ConfigError` when neither of S and K divides the other.
    """

    slices: int
    world_size: int
    rank: int

    def __post_init__(self) -> None:
        big, small = max(self.slices, self.world_size), min(self.slices, self.world_size)
        if small < 1 or big % small:
            raise ConfigError(
                f"hd_pissa.slices is {self.slices} with {self.world_size} ranks: one must be a multiple of "
                f"the other; use {self._nearest_valid()}"
            )

    def _nearest_valid(self) -> str:
        world = self.world_size
        valid = [s for s in range(1, self.slices + world + 1) if s % world == 0 or world % s == 0]
        best = sorted(sorted(valid, key=lambda s: abs(s - self.slices))[:3])
        return "slices = " + " or ".join(str(s) for s in best)

    @property
    def slices_per_rank(self) -> int:
        """c where S = c·K, else 1."""
        return max(1, self.slices // self.world_size)

    @property
    def ranks_per_slice(self) -> int:
        """c where K = c·S, else 1."""
        return max(1, self.world_size // self.slices)

    @property
    def group_size(self) -> int:
        """Ranks of one exchange group: together they own every slice exactly once."""
        return min(self.slices, self.world_size)

    @property
    def replica(self) -> int:
        """This rank's index among the ranks that share its slice, and the index of its exchange group."""
        return self.rank % self.ranks_per_slice

    @property
    def owned(self) -> range:
        """The slice ids this rank owns, in order."""
        return self.owned_by(self.rank)

    def owned_by(self, rank: int) -> range:
        """The slice ids a rank owns, in order."""
        first = rank // self.ranks_per_slice * self.slices_per_rank
        return range(first, first + self.slices_per_rank)

    @property
    def group(self) -> list[int]:
        """The ranks of this rank's exchange group, in slice order."""
        return list(range(self.replica, self.world_size, self.ranks_per_slice))

    def exchange_groups(self) -> list[list[int]]:
        """For each replica index the ranks that own all slices between them, in slice order."""
        step = self.ranks_per_slice
        return [list(range(q, self.world_size, step)) for q in range(step)]

    def slice_groups(self) -> list[list[int]]:
        """For each slice the ranks that share it; groups of one when S ≥ K."""
        step = self.ranks_per_slice
        return [list(range(first, first + step)) for first in range(0, self.world_size, step)]

    def micro_batches_per_slice(self, gradient_accumulation_steps: int) -> int:
        """Micro-batches that one slice accumulates in an optimizer step (M).

        Raises `ConfigError` when a rank cannot give each of its slices the same share.
        """
        if gradient_accumulation_steps % self.slices_per_rank:
            raise ConfigError(
                f"gradient_accumulation_steps is {gradient_accumulation_steps} with {self.slices_per_rank} "
                f"slices per rank: it must be a multiple of {self.slices_per_rank}, so that each slice gets "
                f"its own micro-batches; use {self._next_multiple(gradient_accumulation_steps)}"
            )
        return gradient_accumulation_steps * self.world_size // self.slices

    def _next_multiple(self, steps: int) -> int:
        return -(-steps // self.slices_per_rank) * self.slices_per_rank

    def schedule(self, gradient_accumulation_steps: int) -> list[tuple[int, int]]:
        """What this rank works off in one optimizer step: (slice id, micro-batch of that slice) in order."""
        per_slice = self.micro_batches_per_slice(gradient_accumulation_steps)
        return [(i, j) for i in self.owned for j in range(self.replica, per_slice, self.ranks_per_slice)]


@dataclass(frozen=True)
class ShardRange:
    """One rank's part of a row-major (rows × cols) matrix that ZeRO-3 cuts flat.

    ZeRO-3 gives rank k the elements [k·p, (k+1)·p) with p = ceil(rows·cols / K). The
    cut ignores rows, the last shard is short, and a rank may own nothing at all.
    """

    start: int
    stop: int
    cols: int

    @classmethod
    def of(cls, rank: int, world_size: int, rows: int, cols: int) -> ShardRange:
        """The range of `rank`; start == stop when it owns nothing."""
        numel = rows * cols
        size = -(-numel // world_size)
        start = min(rank * size, numel)
        return cls(start, min(start + size, numel), cols)

    def part(self, begin: int, end: int) -> ShardRange:
        """Elements [begin, end) of this range; less, or nothing, where the range is shorter."""
        return ShardRange(min(self.start + begin, self.stop), min(self.start + end, self.stop), self.cols)

    @property
    def numel(self) -> int:
        """Elements owned, padding excluded."""
        return self.stop - self.start

    @property
    def row_start(self) -> int:
        """First row touched."""
        return self.start // self.cols if self.numel else 0

    @property
    def row_stop(self) -> int:
        """One past the last row touched; rows at both ends may be shared with a neighbour."""
        return -(-self.stop // self.cols) if self.numel else 0

    @property
    def rows(self) -> int:
        """Rows touched."""
        return self.row_stop - self.row_start
