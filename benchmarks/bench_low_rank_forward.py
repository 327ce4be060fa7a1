"""How fast is p = x Aᵀ against torch, and against reading x once?

python benchmarks/bench_low_rank_forward.py
"""

from __future__ import annotations

from hdpissa.benchmarks.thin_products import Layer, compare
from hdpissa.kernels import api


def call(layer: Layer, impl: str):
    """One launch."""
    return lambda: api.low_rank_forward(layer.x, layer.A, impl=impl)


def main() -> None:
    compare(
        "bench_low_rank_forward",
        "p = x Aᵀ; the least traffic is one reading of x.",
        call,
        lambda layer: layer.x.nbytes + layer.A.nbytes,
    )


if __name__ == "__main__":
    main()
