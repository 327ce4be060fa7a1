"""How fast are q = dy B and grad B += dyᵀ p against torch, and against reading dy once?

python benchmarks/bench_low_rank_grad_B.py
"""

from __future__ import annotations

import torch

from hdpissa.benchmarks.thin_products import Layer, compare
from hdpissa.kernels import api


def call(layer: Layer, impl: str):
    """All passes of the kernel."""
    grad, p = torch.zeros_like(layer.B), torch.randn(len(layer.dy), layer.r, device=layer.dy.device).to(layer.dy.dtype)
    return lambda: api.low_rank_grad_B_(grad, layer.dy, p, layer.B, impl=impl)


def main() -> None:
    compare(
        "bench_low_rank_grad_B",
        "q = dy B and grad B += dyᵀ p; the least traffic is one reading of dy, grad B read and written.",
        call,
        lambda layer: layer.dy.nbytes + 3 * layer.B.nbytes,
    )


if __name__ == "__main__":
    main()
