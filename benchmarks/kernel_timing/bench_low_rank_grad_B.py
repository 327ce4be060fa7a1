"""How fast are q = dy B and grad B += dyᵀ p against torch, and against reading dy once?

python benchmarks/kernel_timing/bench_low_rank_grad_B.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hdpissa.benchmarks.kernel_timing.thin_products import Layer, compare, write
from hdpissa.kernels import api


def call(layer: Layer, impl: str):
    """All passes of the kernel."""
    grad, p = torch.zeros_like(layer.B), torch.randn(len(layer.dy), layer.r, device=layer.dy.device).to(layer.dy.dtype)
    return lambda: api.low_rank_grad_B_(grad, layer.dy, p, layer.B, impl=impl)


def rows() -> Iterator[dict[str, Any]]:
    """One by one, as they are measured."""
    return compare(call, lambda layer: layer.dy.nbytes + 3 * layer.B.nbytes)


def main() -> None:
    write(
        "bench_low_rank_grad_B",
        "q = dy B and grad B += dyᵀ p; the least traffic is one reading of dy, grad B read and written.",
        list(rows()),
    )


if __name__ == "__main__":
    main()
