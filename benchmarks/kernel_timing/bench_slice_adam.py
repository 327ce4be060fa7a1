"""How near does Adam over the flat factor buffers come to a plain copy?

python benchmarks/kernel_timing/bench_slice_adam.py
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from hdpissa.benchmarks.common import timing
from hdpissa.kernels import api

IDENTITY = ("elements", "wire")
COLUMNS = [*IDENTITY, "ms", "torch ms", "% of copy bandwidth"]
# own slices' factors of Llama-2-7B at r = 16 (40 M), and of 8 such slices
SIZES = (40_000_000, 320_000_000)


def row(numel: int, wire: torch.dtype, bandwidth: float) -> dict[str, Any]:
    """One measurement: reads the gradient and both moments, writes both moments and Δ."""
    m, v, grad = (torch.rand(numel, device=timing.need_gpu()) for _ in range(3))
    hyper: dict[str, Any] = {"step": 7, "lr": 2e-5, "betas": (0.9, 0.999), "eps": 1e-8, "dtype": wire}
    adam = partial(api.slice_adam_, m, v, grad, **hyper)
    times = timing.medians({"ms": partial(adam, impl="triton"), "torch ms": partial(adam, impl="torch")})
    share = 100 * numel * (20 + wire.itemsize) / (times["ms"] * 1e-3) / bandwidth
    return {"elements": numel, "wire": str(wire)[6:], **times, "% of copy bandwidth": share}


def rows() -> Iterator[dict[str, Any]]:
    """One by one, as they are measured."""
    bandwidth = timing.copy_bandwidth()
    yield from (row(numel, wire, bandwidth) for numel in SIZES for wire in (torch.float32, torch.bfloat16))


def main() -> None:
    timing.need_gpu()
    measured = list(rows())
    note = f"Adam over flat buffers; copy bandwidth {timing.copy_bandwidth() / 1e12:.2f} TB/s."
    timing.write("bench_slice_adam", measured, COLUMNS, note, identity=IDENTITY, configuration=timing.ONE_RUN)


if __name__ == "__main__":
    main()
