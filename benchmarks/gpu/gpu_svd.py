"""Phase `svd` of gpu.py: the decomposition of three shapes of a 7B model, ours beside torch's, and how right it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.gpu import gpu_rows
from hdpissa.benchmarks.startup import svd_methods
from hdpissa.engine.directions import svd

SHAPES = ((1024, 4096), (4096, 4096), (4096, 11008))
TINY = ((32, 64), (48, 48), (48, 96))
RANK = 128  # r = 16, S = 8
SPECTRUM = "flat"  # the harder of the two


def residual(W: Tensor, U: Tensor, sigma: Tensor, Vt: Tensor) -> float:
    """The largest ‖W v − σ u‖ / σ in float64."""
    off = W.double() @ Vt.double().t() - U.double() * sigma.double()
    return (off.norm(dim=0) / sigma.double()).max().item()


Found = tuple[Tensor, Tensor, Tensor, str]  # U, sigma, Vt, method


def ours(W: Tensor, rank: int) -> Found:
    found = svd.top_triplets(W, rank)
    return found.U, found.sigma, found.Vt, found.method


def torchs(W: Tensor, rank: int) -> Found:
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank], sigma[:rank], Vt[:rank], "full, fp32"


def rows() -> Iterator[dict[str, Any]]:
    """Ours of all shapes first: torch's take longest."""
    device = timing.need_gpu()
    shapes, rank = (TINY, 16) if gpu_rows.is_dry() else (SHAPES, RANK)
    svd.top_triplets(torch.randn(*shapes[0], device=device), rank)  # libraries are loaded
    ways: dict[str, Callable[[Tensor, int], Found]] = {"ours": ours, "torch": torchs}
    for name, way in ways.items():
        for shape in shapes:
            W = svd_methods.imitated(*shape, SPECTRUM, device)

            def measured(way: Callable = way, W: Tensor = W) -> dict[str, Any]:
                seconds, (*triplets, method) = svd_methods.timed(lambda: way(W, rank), device)
                return {"seconds": seconds, "method": method, "residual": residual(W, *triplets)}

            yield gpu_rows.attempt({"by": name, "shape": f"{shape[0]} × {shape[1]}", "rank": rank}, measured)


if __name__ == "__main__":
    raise SystemExit(gpu_rows.record_all(rows()))
