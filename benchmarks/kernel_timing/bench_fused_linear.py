"""Does the thin product ride in the big one for less than it costs beside cuBLAS? Both directions, per shape.

python benchmarks/kernel_timing/bench_fused_linear.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.kernel_timing import thin_products
from hdpissa.benchmarks.kernel_timing.thin_products import Layer
from hdpissa.kernels import api

IDENTITY = ("layer", "r", "direction")
COLUMNS = [*IDENTITY, "linear alone ms", "separate ms", "fused ms", "faster", "overhead %"]


def row(layer: Layer, direction: str) -> dict[str, Any]:
    """The frozen product alone, with the thin kernel beside it, and fused."""
    wide, W, thin = (layer.x, layer.W, layer.A) if direction == "forward" else (layer.dy, layer.W.t(), layer.B.t())
    linear = torch.nn.functional.linear
    works = {
        "linear alone ms": lambda: linear(wide, W),
        "separate ms": lambda: (linear(wide, W), api.low_rank_forward(wide, thin, impl="triton")),
        "fused ms": lambda: api.fused_linear(wide, W, thin, impl="triton"),
    }
    times = timing.medians(works)
    faster = min(("separate", "fused"), key=lambda name: times[f"{name} ms"])
    overhead = 100 * (times[f"{faster} ms"] / times["linear alone ms"] - 1)
    return {
        "layer": layer.name,
        "r": layer.r,
        "direction": direction,
        **times,
        "faster": faster,
        "overhead %": overhead,
    }


def rows() -> Iterator[dict[str, Any]]:
    """One by one, as they are measured."""
    yield from (row(layer, direction) for layer in thin_products.layers() for direction in ("forward", "backward"))


def main() -> None:
    measured = list(rows())
    note = (
        f"y and p (backward: dx and q) at {thin_products.TOKENS} tokens, bf16; overhead of the faster over the product "
        f"alone."
    )
    kept: dict[str, Any] = {"identity": IDENTITY, "configuration": thin_products.configuration()}
    timing.write("bench_fused_linear", measured, COLUMNS, note, **kept)


if __name__ == "__main__":
    main()
