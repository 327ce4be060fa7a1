"""What does a rank's own dense delta cost, which the dense exchange sends in place of factors?

python benchmarks/kernel_timing/bench_dense_delta.py
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.kernel_timing import shapes
from hdpissa.benchmarks.kernel_timing.bench_delta_apply import RANK, factors
from hdpissa.kernels import api

IDENTITY = ("weight", "own slices", "result")
COLUMNS = [*IDENTITY, "ms", "torch ms", "% of copy bandwidth"]


def row(shape: shapes.Shape, slices: int, dtype: torch.dtype, bandwidth: float) -> dict[str, Any]:
    """One measurement over the whole weight."""
    made, numel = factors(shape.rows, shape.cols, slices * RANK, torch.float32), shape.rows * shape.cols
    how: dict[str, Any] = {"start": 0, "numel": numel, "second_order": True, "dtype": dtype}
    delta = partial(api.dense_delta, *made, **how)
    times = timing.medians({"ms": partial(delta, impl="triton"), "torch ms": partial(delta, impl="torch")})
    share = 100 * numel * dtype.itemsize / (times["ms"] * 1e-3) / bandwidth
    name = {"weight": shape.name, "own slices": slices, "result": str(dtype)[6:]}
    return {**name, **times, "% of copy bandwidth": share}


def rows() -> Iterator[dict[str, Any]]:
    """One by one, as they are measured."""
    bandwidth = timing.copy_bandwidth()
    weights = (*shapes.LLAMA_2_7B, *shapes.LLAMA_3_70B)
    cases = [(slices, dtype) for slices in (1, 4) for dtype in (torch.bfloat16, torch.float32)]
    yield from (row(shape, *case, bandwidth) for shape in weights for case in cases)


def main() -> None:
    timing.need_gpu()
    measured = list(rows())
    note = f"D of the own slices, r = {RANK}; the least traffic is writing the result once."
    kept: dict[str, Any] = {"identity": IDENTITY, "configuration": {"r": RANK, **timing.ONE_RUN}}
    timing.write("bench_dense_delta", measured, COLUMNS, note, **kept)


if __name__ == "__main__":
    main()
