"""How near does the delta on a shard come to a plain copy of it? 8 bytes of traffic per parameter is the least.

python benchmarks/kernel_timing/bench_delta_apply.py
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.kernel_timing import shapes
from hdpissa.kernels import api, reference

RANK = 16
SLICES = (1, 2, 4, 8, 16)
IDENTITY = ("weight", "slices", "wire", "precision")
COLUMNS = [*IDENTITY, "ms", "% of copy bandwidth", "torch ms", "relative error of D"]


def factors(rows: int, cols: int, Q: int, wire: torch.dtype) -> list[Tensor]:
    """ΔA, ΔB, A, B of the sizes they have in a run."""
    device = timing.need_gpu()
    shapes_ = ((Q, cols), (rows, Q), (Q, cols), (rows, Q))
    dtypes, sizes = (wire, wire, torch.float32, torch.float32), (2e-5, 2e-5, 0.1, 0.1)
    made = zip(shapes_, sizes, dtypes, strict=True)
    return [(torch.randn(*shape, device=device) * size).to(dtype) for shape, size, dtype in made]


def error(factors: list[Tensor], precision: str) -> float:
    """Of the D that is subtracted, against float64, on the first rows."""
    dA, dB, A, B = factors[0], factors[1][:64], factors[2], factors[3][:64]
    w = torch.zeros(64 * A.shape[1], device=A.device)
    bad = torch.zeros(1, dtype=torch.int32, device=A.device)
    arguments: dict[str, Any] = {"start": 0, "second_order": True}
    api.delta_apply_((w,), dA, dB, A, B, bad, scale=1.0, precision=precision, impl="triton", **arguments)
    doubles = [t.double() for t in (dA, dB, A, B)]
    truth = reference.dense_delta(*doubles, numel=w.numel(), dtype=torch.float64, **arguments)
    return ((w.double() + truth).norm() / truth.norm()).item()


def row(shape: shapes.Shape, slices: int, wire: torch.dtype, precision: str, bandwidth: float) -> dict[str, Any]:
    """One measurement on a split shard that is the whole weight."""
    made = factors(shape.rows, shape.cols, slices * RANK, wire)
    parts = reference.split_fp32(torch.randn(shape.rows * shape.cols, device=made[0].device))
    bad = torch.zeros(1, dtype=torch.int32, device=made[0].device)
    how: dict[str, Any] = {"start": 0, "scale": 1.0, "second_order": True}
    dA, dB, A, B = made
    apply = partial(api.delta_apply_, parts, dA, dB, A, B, bad, **how)
    works = {"ms": partial(apply, impl="triton", precision=precision), "torch ms": partial(apply, impl="torch")}
    times = timing.medians(works)
    return {
        "weight": shape.name, "slices": slices, "wire": str(wire)[6:], "precision": precision, **times,
        "% of copy bandwidth": 100 * 8 * parts[0].numel() / (times["ms"] * 1e-3) / bandwidth,
        "relative error of D": error(made, precision),
    }  # fmt: skip


def rows() -> Iterator[dict[str, Any]]:
    """One by one, as they are measured."""
    bandwidth = timing.copy_bandwidth()
    fp32, bf16 = torch.float32, torch.bfloat16
    cases = [(s, fp32, "fp32") for s in SLICES] + [(8, bf16, "fp32"), (8, fp32, "tf32")]
    weights = (*shapes.LLAMA_2_7B, *shapes.LLAMA_3_70B)
    yield from (row(shape, *case, bandwidth) for shape in weights for case in cases)


def main() -> None:
    timing.need_gpu()
    measured = list(rows())
    bandwidth = timing.copy_bandwidth()
    note = (
        f"W ← W − D on a split fp32 shard, r = {RANK}, the splitting of the factors included; copy bandwidth "
        f"{bandwidth / 1e12:.2f} TB/s. Limit: 80 % of it up to 8 slices."
    )
    kept: dict[str, Any] = {"identity": IDENTITY, "configuration": {"r": RANK, **timing.ONE_RUN}}
    timing.write("bench_delta_apply", measured, COLUMNS, note, **kept)


if __name__ == "__main__":
    main()
