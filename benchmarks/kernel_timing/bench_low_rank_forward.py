"""How fast is p = x Aᵀ against torch, and against reading x once?

python benchmarks/kernel_timing/bench_low_rank_forward.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hdpissa.benchmarks.kernel_timing.thin_products import Layer, compare, write
from hdpissa.kernels import api


def call(layer: Layer, impl: str):
    """One launch."""
    return lambda: api.low_rank_forward(layer.x, layer.A, impl=impl)


def rows() -> Iterator[dict[str, Any]]:
    """One by one, as they are measured."""
    return compare(call, lambda layer: layer.x.nbytes + layer.A.nbytes)


def main() -> None:
    write("bench_low_rank_forward", "p = x Aᵀ; the least traffic is one reading of x.", list(rows()))


if __name__ == "__main__":
    main()
