"""Does the thin product ride in the big one for less than it costs beside cuBLAS? Both directions, per shape.

python benchmarks/bench_fused_linear.py
"""

from __future__ import annotations

from typing import Any

import torch

from hdpissa.benchmarks import timing
from hdpissa.benchmarks.thin_products import TOKENS, Layer, layers
from hdpissa.kernels import api

COLUMNS = ["layer", "r", "direction", "linear alone ms", "separate ms", "fused ms", "faster", "overhead %"]


def row(layer: Layer, direction: str) -> dict[str, Any]:
    """The frozen product alone, with the thin kernel beside it, and fused."""
    wide, W, thin = (layer.x, layer.W, layer.A) if direction == "forward" else (layer.dy, layer.W.t(), layer.B.t())
    linear = torch.nn.functional.linear
    times = {
        "linear alone ms": timing.median_ms(lambda: linear(wide, W)),
        "separate ms": timing.median_ms(lambda: (linear(wide, W), api.low_rank_forward(wide, thin, impl="triton"))),
        "fused ms": timing.median_ms(lambda: api.fused_linear(wide, W, thin, impl="triton")),
    }
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


if __name__ == "__main__":
    rows = [row(layer, direction) for layer in layers() for direction in ("forward", "backward")]
    note = f"y and p (backward: dx and q) at {TOKENS} tokens, bf16; overhead of the faster over the product alone."
    timing.write("bench_fused_linear", rows, COLUMNS, note)
