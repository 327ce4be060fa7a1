"""How fast is grad A += qᵀ x against torch, and against reading x once?

python benchmarks/kernel_timing/bench_low_rank_grad_A.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hdpissa.benchmarks.kernel_timing.thin_products import Layer, compare, write
from hdpissa.kernels import api


def call(layer: Layer, impl: str):
    """Both passes of the kernel."""
    grad, q = torch.zeros_like(layer.A), torch.randn(len(layer.x), layer.r, device=layer.x.device).to(layer.x.dtype)
    return lambda: api.low_rank_grad_A_([grad], [q], layer.x, impl=impl)


def rows() -> Iterator[dict[str, Any]]:
    """One by one, as they are measured."""
    return compare(call, lambda layer: layer.x.nbytes + 2 * layer.A.nbytes)


def main() -> None:
    write(
        "bench_low_rank_grad_A",
        "grad A += qᵀ x; the least traffic is one reading of x, grad A read and written.",
        list(rows()),
    )


if __name__ == "__main__":
    main()
