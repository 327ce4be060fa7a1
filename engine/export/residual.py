"""How far an adapter, as it was written, is from the change of W that it stands for.

    ‖ΔW − s · lora_B lora_A‖ / ‖ΔW‖          ΔW = W_n − W_0, both exact

Every rank measures its own shards, W_0 read from the base's files and the pair from the adapter's by rank 0, which
hands it round; only sums of squares are added up. Nobody forms a matrix: ΔW goes piece by piece of the shard, the
pair in blocks of components. What is found therefore covers all there is: second-order terms, a smaller rank, the
rounding of the file's dtype and of W itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..precision import full_fp32
from ..sharding.base_files import open_tensors
from ..sharding.slicing import ShardRange
from .adapter import Adapted, key_A, key_B
from .report import Residual
from .streams import World

PIECE_ELEMENTS = 4 * 2**20  # of ΔW, and of a block of the pair: 16 MiB each


@dataclass(frozen=True)
class Change:
    """One weight's ΔW, as far as this rank has it.

    Attributes:
        owned: this rank's flat range. size: the longest range of any rank.
        trained, base: W_n and W_0 on part of `owned`.
    """

    adapted: Adapted
    owned: ShardRange
    size: int
    trained: Callable[[int, int], Tensor]
    base: Callable[[ShardRange], Tensor]


class Pairs(Protocol):
    """Who has a weight's pair, and hands it to all ranks.

    Attributes:
        problem: what went wrong on rank 0; kept until all ranks are through, because the others wait in a broadcast.
    """

    world: World
    problem: Exception | None

    def read(self, adapted: Adapted, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Components [begin, end) of (lora_A, lora_B), fp32; collective."""


class FilePairs:
    """The pairs of a written adapter, read on rank 0 and handed to all; zeros after a failure."""

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.world = path, world
        self.problem: Exception | None = None
        self._file: Any = None

    def read(self, adapted: Adapted, begin: int, end: int) -> tuple[Tensor, Tensor]:
        shapes = (end - begin, adapted.cols), (adapted.rows, end - begin)
        if self.world.rank == 0:
            A, B = (t.to(self.world.device) for t in self._read(adapted, begin, end, shapes))
        else:
            A, B = (torch.empty(shape, device=self.world.device) for shape in shapes)
        if self.world.size > 1:
            dist.broadcast(A, 0)
            dist.broadcast(B, 0)
        return A, B

    def _read(self, adapted: Adapted, begin: int, end: int, shapes: tuple) -> tuple[Tensor, Tensor]:
        name = adapted.names[0]
        try:
            self._file = self._file or open_tensors(self.path)
            A = self._file.get_slice(key_A(name))[begin:end].float()
            return A, self._file.get_slice(key_B(name))[:, begin:end].float().contiguous()
        except Exception as error:
            self.problem = self.problem or error
            return torch.zeros(shapes[0]), torch.zeros(shapes[1])


def measure(changes: Sequence[Change], reader: Pairs, *, updates: int) -> Residual:
    """The residual of an adapter; collective.

    Args:
        updates: steps that have changed W, for the estimate of the floor.

    Raises:
        Exception: `reader.problem`, on rank 0, after all ranks are through.
    """
    world = reader.world
    squares = torch.zeros(len(changes), 3, dtype=torch.float64)
    with full_fp32():
        for row, change in zip(squares, changes, strict=True):
            for begin in range(0, change.size, PIECE_ELEMENTS):
                row += _measure_piece(change, reader, begin, min(begin + PIECE_ELEMENTS, change.size))
    if world.size > 1:
        here = squares.to(world.device)
        dist.all_reduce(here)
        squares = here.cpu()
    if reader.problem is not None:
        raise reader.problem
    return _summary(changes, squares, updates)


def _measure_piece(change: Change, reader: Pairs, begin: int, end: int) -> Tensor:
    """(‖ΔW − adapter‖², ‖ΔW‖², Σ ulp(W)²/12) of a piece of the own shard, which may be empty."""
    where, adapted = change.owned.part(begin, end), change.adapted
    trained = change.trained(begin, begin + where.numel).to(reader.world.device)
    left = trained - change.base(where).to(trained)
    whole, rounding = _squares(left), _rounding(trained)
    step = max(1, PIECE_ELEMENTS // (adapted.rows + adapted.cols))
    for first in range(0, adapted.r, step):
        A, B = reader.read(adapted, first, min(first + step, adapted.r))
        if adapted.transposed:
            A, B = B.t(), A.t()
        if where.numel:
            product = torch.mm(B[where.row_start : where.row_stop], A).flatten()
            skip = where.start - where.row_start * where.cols
            left -= adapted.scale * product[skip : skip + where.numel]
    return torch.stack([_squares(left), whole, rounding]).cpu()


def _squares(values: Tensor) -> Tensor:
    """Σ x², float64; in float32 within short stretches, which is ten times faster than converting all."""
    return sum((torch.dot(x, x).double() for x in values.split(2**18)), values.new_zeros((), dtype=torch.float64))


def _rounding(W: Tensor) -> Tensor:
    """Expected square of the error of rounding each of these fp32 numbers once: ulp² / 12, summed."""
    exponents = (W.view(torch.int32) >> 23) & 0xFF  # biased by 127; an ulp is 2⁻²³ of the power
    counts = torch.bincount(exponents, minlength=256).double()
    ulps = torch.exp2(torch.arange(256, dtype=torch.float64, device=W.device).clamp_min(1) - 150)
    return (counts * ulps.square()).sum() / 12


def _summary(changes: Sequence[Change], squares: Tensor, updates: int) -> Residual:
    left, whole, rounding = squares.sum(0).tolist()
    relative = [_relative(a, b) for a, b, _ in squares.tolist()]
    worst = max(range(len(changes)), key=lambda i: relative[i])
    floor = _relative(rounding * updates, whole)
    return Residual(_relative(left, whole), relative[worst], changes[worst].adapted.names[0], floor)


def _relative(part: float, whole: float) -> float:
    """√(part / whole); a weight that has not changed has nothing left out."""
    if whole:
        return math.sqrt(part / whole)
    return 0.0 if not part else math.inf
