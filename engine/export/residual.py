"""How far an adapter, as it was written, is from the change of W that it stands for.

    ‖ΔW − s · lora_B lora_A‖ / ‖ΔW‖          ΔW = W_n − W_0, both exact

Every rank measures its own shards: W_0 comes from the base's files, the pair from rank 0, which broadcasts it; only
sums of squares are added up. No matrix is formed: ΔW goes piece by piece of the shard, the pair in blocks of
components. The result covers everything: second-order terms, a smaller rank, the rounding of the file's dtype and of W
itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..precision import full_fp32
from ..sharding.slicing import ShardRange
from .lora_format import LoraWeight
from .lora_pairs import FilePairs
from .report import Residual

PIECE_ELEMENTS = 4 * 2**20  # of ΔW, and of a block of the pair: 16 MiB each


@dataclass(frozen=True)
class Change:
    """This rank's part of one weight's ΔW.

    Attributes:
        owned: this rank's flat range. size: elements of the longest range of any rank.
        trained: [begin, end) of `owned` → W_n. base: a part of `owned` → W_0. Both flat.
    """

    weight: LoraWeight
    owned: ShardRange
    size: int
    trained: Callable[[int, int], Tensor]
    base: Callable[[ShardRange], Tensor]


def measure(changes: Sequence[Change], pairs: FilePairs, *, updates: int) -> Residual:
    """The residual of an adapter; collective. Meaningless where `pairs.problem` is set afterwards.

    Args:
        updates: steps that have changed W, for the estimate of the floor.
    """
    squares = torch.zeros(len(changes), 3, dtype=torch.float64)
    with full_fp32():
        for row, change in zip(squares, changes, strict=True):
            for begin in range(0, change.size, PIECE_ELEMENTS):
                row += _measure_piece(change, pairs, begin, min(begin + PIECE_ELEMENTS, change.size))
    if pairs.world.size > 1:
        here = squares.to(pairs.world.device)
        dist.all_reduce(here)
        squares = here.cpu()
    left, whole, rounding = squares.sum(0).tolist()
    relative = [_relative(a, b) for a, b, _ in squares.tolist()]
    worst = max(range(len(changes)), key=lambda i: relative[i])
    floor = _relative(rounding * updates, whole)
    return Residual(_relative(left, whole), relative[worst], changes[worst].weight.names[0], floor)


def _measure_piece(change: Change, pairs: FilePairs, begin: int, end: int) -> Tensor:
    """(‖ΔW − adapter‖², ‖ΔW‖², Σ ulp(W)²/12) of a piece of the own shard, which may be empty."""
    where, weight = change.owned.part(begin, end), change.weight
    trained = change.trained(begin, begin + where.numel).to(pairs.world.device)
    left = trained - change.base(where).to(trained)
    whole, rounding = sum_squares(left), rounding_error(trained)
    step = max(1, PIECE_ELEMENTS // (weight.rows + weight.cols))
    for first in range(0, weight.r, step):
        A, B = pairs.read(weight, first, min(first + step, weight.r))
        if weight.transposed:
            A, B = B.t(), A.t()
        if where.numel:
            product = torch.mm(B[where.row_start : where.row_stop], A).flatten()
            skip = where.start - where.row_start * where.cols
            left -= weight.scale * product[skip : skip + where.numel]
    return torch.stack([sum_squares(left), whole, rounding]).cpu()


def sum_squares(values: Tensor) -> Tensor:
    """Σ x² in float64, in float32 within short stretches: ten times faster than converting everything."""
    return sum((torch.dot(x, x).double() for x in values.split(2**18)), values.new_zeros((), dtype=torch.float64))


def rounding_error(W: Tensor) -> Tensor:
    """Expected square of the error of rounding each of these fp32 numbers once: ulp² / 12, summed."""
    exponents = (W.view(torch.int32) >> 23) & 0xFF  # biased by 127; an ulp is 2⁻²³ of the power
    counts = torch.bincount(exponents, minlength=256).double()
    ulps = torch.exp2(torch.arange(256, dtype=torch.float64, device=W.device).clamp_min(1) - 150)
    return (counts * ulps.square()).sum() / 12


def _relative(part: float, whole: float) -> float:
    """√(part / whole); a weight that has not changed has nothing left out."""
    if whole:
        return math.sqrt(part / whole)
    return 0.0 if not part else math.inf
