"""Pairs (lora_A, lora_B) whose slices are spread over the ranks: how they reach a file, one rank, or all ranks.

A pair is streamed slice by slice. Only a cut to a smaller rank, a spectrum, and the residual of sums in memory bring a
whole pair (never the weight) together on rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.faults import fault
from ..sharding.base_files import open_tensors
from ..sharding.slicing import SlicePlan
from . import writer
from .lora_format import LoraWeight, Truncation, key_A, key_B, truncate
from .writer import Block, Entry, World, on_rank0


@dataclass(frozen=True)
class Pair:
    """One weight's pair, as the ranks have it.

    Attributes:
        factors: index of an own slice → (A, ΣΔA: R × I; B, ΣΔB: O × R), fp32, as the model stores the matrix.
    """

    weight: LoraWeight
    plan: SlicePlan
    factors: Callable[[int], tuple[Tensor, Tensor, Tensor, Tensor]]

    def rows_A(self, index: int) -> Tensor:
        """lora_A's rows of an own slice, 2·R × I."""
        A, sum_A, B, sum_B = self.factors(index)
        return torch.cat([B.t(), -sum_B.t()]) if self.weight.transposed else torch.cat([A, -sum_A])

    def columns_B(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of lora_B's columns of all own slices, C × 2·R per slice."""
        parts = []
        for index in range(self.plan.slices_per_rank):
            A, sum_A, B, sum_B = self.factors(index)
            B, sum_B = (A.t(), sum_A.t()) if self.weight.transposed else (B, sum_B)
            parts += [-sum_B[first:last], B[first:last].clone()]  # a view would keep the whole of a file's
        return torch.cat(parts, 1)

    # --- to a file

    def blocks_A(self, dtype: torch.dtype) -> Iterator[Block]:
        """A slice at a time, from the first rank that owns it."""
        plan, numel = self.plan, self.weight.r // self.plan.slices * self.weight.cols
        for slice_id in range(plan.slices):
            owner = slice_id // plan.slices_per_rank * plan.ranks_per_slice
            sizes = [numel if rank == owner else 0 for rank in range(plan.world_size)]
            yield Block(sizes, partial(_elements, partial(self.rows_A, slice_id - plan.owned_by(owner).start), dtype))

    def blocks_B(self, dtype: torch.dtype) -> Iterator[Block]:
        """Some rows at a time, all slices side by side."""
        plan, weight = self.plan, self.weight
        step = max(1, writer.PIECE_BYTES // (weight.r * dtype.itemsize))
        for first in range(0, weight.rows, step):
            last = min(first + step, weight.rows)
            numel = (last - first) * weight.r // plan.slices * plan.slices_per_rank
            sizes = [0 if rank % plan.ranks_per_slice else numel for rank in range(plan.world_size)]
            yield Block(sizes, partial(_elements, partial(self.columns_B, first, last), dtype), rows=last - first)

    # --- to rank 0

    def own_part(self, world: World) -> list[tuple[Tensor, Tensor]]:
        """This rank's (rows of lora_A, columns of lora_B) for `gather`; on rank 0 also room for the other owners'.

        Does not communicate, so that ranks can agree on its success before they do.
        """
        fault("pairs.own_part")
        A = torch.cat([self.rows_A(index) for index in range(self.plan.slices_per_rank)])
        B = self.columns_B(0, self.weight.rows)
        others = self.plan.group_size - 1 if world.rank == 0 else 0
        return [(A, B), *((torch.empty_like(A), torch.empty_like(B)) for _ in range(others))]

    def gather(self, parts: Sequence[tuple[Tensor, Tensor]], world: World) -> tuple[Tensor, Tensor] | None:
        """The whole pair on rank 0, fp32, and None elsewhere; collective.

        Args:
            parts: of `own_part`.
        """
        for number, owner in enumerate(range(0, world.size, self.plan.ranks_per_slice)):
            if owner and world.rank == 0:
                for tensor in parts[number]:
                    dist.recv(tensor, owner)
            elif owner and world.rank == owner:
                for tensor in parts[0]:
                    dist.send(tensor, 0)
        if world.rank:
            return None
        return torch.cat([A for A, _ in parts]), torch.cat([B for _, B in parts], 1)


def _elements(matrix: Callable[[], Tensor], dtype: torch.dtype, begin: int, end: int) -> Tensor:
    return matrix().flatten()[begin:end].to(dtype)


# --- cut to a smaller rank -------------------------------------------------------------------------


@dataclass
class CutPair:
    """A pair that is cut on rank 0 as it is written; lora_A first.

    Attributes:
        weight: with the smaller rank. tail: sums up what is left out.
    """

    whole: Pair
    weight: LoraWeight
    world: World
    tail: Truncation
    _pair: tuple[Tensor, Tensor] | None = None

    def blocks_A(self, dtype: torch.dtype) -> Iterator[Block]:
        whole = self.whole.gather(self.whole.own_part(self.world), self.world)
        if whole is not None:
            self._pair = truncate(*whole, self.weight.r, scale=self.weight.scale, tail=self.tail)
        return self._blocks(0, self.weight.r * self.weight.cols, dtype)

    def blocks_B(self, dtype: torch.dtype) -> Iterator[Block]:
        return self._blocks(1, self.weight.rows * self.weight.r, dtype)

    def _blocks(self, which: int, numel: int, dtype: torch.dtype) -> Iterator[Block]:
        pair = self._pair
        return on_rank0(numel, partial(_elements, lambda: pair[which], dtype), self.world)  # type: ignore[index]


def entries(pair: Pair | CutPair, dtype: torch.dtype) -> Iterator[Entry]:
    """The tensors of a pair in the adapter's file, under each of its names."""
    weight = pair.weight
    for name in weight.names:
        yield Entry(key_A(name), (weight.r, weight.cols), dtype, partial(pair.blocks_A, dtype))
        yield Entry(key_B(name), (weight.rows, weight.r), dtype, partial(pair.blocks_B, dtype))


# --- to all ranks ---------------------------------------------------------------------------------


class FilePairs:
    """The pairs of a written adapter, read by rank 0 and broadcast.

    Attributes:
        problem: the first error on rank 0, which broadcasts zeros from then on, because the other ranks wait for it.
    """

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.world = path, world
        self.problem: Exception | None = None
        self._file: Any = None

    def read(self, weight: LoraWeight, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Components [begin, end) of (lora_A, lora_B), fp32; collective."""
        shapes, device = ((end - begin, weight.cols), (weight.rows, end - begin)), self.world.device
        found = self._attempt(weight, begin, end) if self.world.rank == 0 and self.problem is None else None
        A, B = found or (torch.zeros(shape, device=device) for shape in shapes)
        if self.world.size > 1:
            dist.broadcast(A, 0)
            dist.broadcast(B, 0)
        return A, B

    def _attempt(self, weight: LoraWeight, begin: int, end: int) -> tuple[Tensor, ...] | None:
        try:
            pair = self._components(weight, begin, end)
            return tuple(t.to(self.world.device, torch.float32).contiguous() for t in pair)
        except Exception as error:
            self.problem = error
            return None

    def _components(self, weight: LoraWeight, begin: int, end: int) -> tuple[Tensor, Tensor]:
        self._file = self._file or open_tensors(self.path)
        A, B = (self._file.get_slice(key(weight.names[0])) for key in (key_A, key_B))
        return A[begin:end], B[:, begin:end]


class MemoryPairs(FilePairs):
    """The same without a file: each pair is gathered on rank 0 when it is first read."""

    def __init__(self, pairs: Sequence[Pair], world: World) -> None:
        super().__init__(Path(), world)
        self._pairs = {pair.weight: pair for pair in pairs}
        self._current: LoraWeight | None = None
        self._whole: tuple[Tensor, Tensor] | None = None

    def read(self, weight: LoraWeight, begin: int, end: int) -> tuple[Tensor, Tensor]:
        if weight != self._current:
            pair = self._pairs[weight]
            self._current, self._whole = weight, pair.gather(pair.own_part(self.world), self.world)
        return super().read(weight, begin, end)

    def _components(self, weight: LoraWeight, begin: int, end: int) -> tuple[Tensor, Tensor]:
        A, B = self._whole  # type: ignore[misc]
        return A[begin:end], B[:, begin:end]
