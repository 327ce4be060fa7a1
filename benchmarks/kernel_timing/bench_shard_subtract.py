"""How near does subtracting a dense delta from a shard come to a plain copy?

python benchmarks/kernel_timing/bench_shard_subtract.py
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from hdpissa.benchmarks.common import timing
from hdpissa.kernels import api, reference

NUMEL = 2**28
IDENTITY = ("shard", "delta")
COLUMNS = [*IDENTITY, "ms", "torch ms", "% of copy bandwidth"]


def row(form: str, dtype: torch.dtype, bandwidth: float) -> dict[str, Any]:
    """One measurement over 2²⁸ weights."""
    device = timing.need_gpu()
    exact = torch.randn(NUMEL, device=device)
    high, low = reference.split_fp32(exact)
    parts = {"split": (high, low), "master and half": (exact, high), "fp32": (exact,)}[form]
    D, bad = torch.randn(NUMEL, device=device).to(dtype), torch.zeros(1, dtype=torch.int32, device=device)
    subtract = partial(api.shard_subtract_, parts, D, bad, scale=1.0)
    times = timing.medians({"ms": partial(subtract, impl="triton"), "torch ms": partial(subtract, impl="torch")})
    # the half beside a master is only written
    moved = D.nbytes + 2 * sum(p.nbytes for p in parts) - (high.nbytes if form == "master and half" else 0)
    share = 100 * moved / (times["ms"] * 1e-3) / bandwidth
    return {"shard": form, "delta": str(dtype)[6:], **times, "% of copy bandwidth": share}


def rows() -> Iterator[dict[str, Any]]:
    """One by one, as they are measured."""
    bandwidth = timing.copy_bandwidth()
    forms = ("split", "master and half", "fp32")
    yield from (row(form, dtype, bandwidth) for form in forms for dtype in (torch.bfloat16, torch.float32))


def main() -> None:
    timing.need_gpu()
    measured = list(rows())
    note = f"W ← W − D over {NUMEL} weights, each tensor once."
    kept: dict[str, Any] = {"identity": IDENTITY, "configuration": {"weights": NUMEL, **timing.ONE_RUN}}
    timing.write("bench_shard_subtract", measured, COLUMNS, note, **kept)


if __name__ == "__main__":
    main()
