"""What the low-rank kernels' benchmarks share: real layers at 8k tokens, kernel beside torch, bytes beside time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.kernel_timing import shapes

TOKENS = 8192
RANKS = (16, 64)


@dataclass(frozen=True)
class Layer:
    """Random bf16 operands of one Linear: x (T × I), dy (T × O), W (O × I); fp32 A (R × I), B (O × R)."""

    name: str
    r: int
    x: Tensor
    dy: Tensor
    W: Tensor
    A: Tensor
    B: Tensor


def layers() -> Iterator[Layer]:
    """Every distinct Linear of the two Llamas, for every rank."""
    device = timing.need_gpu()

    def random(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    for shape in (*shapes.LLAMA_2_7B, *shapes.LLAMA_3_70B):
        x, dy, W = random(TOKENS, shape.cols), random(TOKENS, shape.rows), random(shape.rows, shape.cols)
        for r in RANKS:
            A, B = random(r, shape.cols, dtype=torch.float32), random(shape.rows, r, dtype=torch.float32)
            yield Layer(f"{shape.name} {shape.rows}x{shape.cols}", r, x, dy, W, A, B)


IDENTITY = ("layer", "r")
COLUMNS = ["layer", "r", "triton ms", "torch ms", "torch / triton", "least bytes MB", "% of copy bandwidth"]


def compare(
    calls: Callable[[Layer, str], Callable[[], object]], nbytes: Callable[[Layer], int]
) -> Iterator[dict[str, Any]]:
    """Times `calls(layer, impl)` for both implementations: a row for each layer.

    Args:
        nbytes: what the operation has to read and write at least, each operand once.
    """
    bandwidth = timing.copy_bandwidth()
    for layer in layers():
        times = timing.medians({f"{impl} ms": calls(layer, impl) for impl in ("triton", "torch")})
        moved = nbytes(layer)
        yield {
            "layer": layer.name, "r": layer.r, **times,
            "torch / triton": times["torch ms"] / times["triton ms"], "least bytes MB": moved / 1e6,
            "% of copy bandwidth": 100 * moved / (times["triton ms"] * 1e-3) / bandwidth,
        }  # fmt: skip


def write(name: str, note: str, rows: list[dict[str, Any]]) -> None:
    """Writes the table of `compare`'s rows."""
    note = f"{note} {TOKENS} tokens, bf16; copy bandwidth {timing.copy_bandwidth() / 1e12:.2f} TB/s."
    timing.write(name, rows, COLUMNS, note, identity=IDENTITY, configuration=configuration())


def configuration() -> dict[str, Any]:
    """What the rows do not tell."""
    return {"tokens": TOKENS, "dtype": "bf16", **timing.ONE_RUN}
