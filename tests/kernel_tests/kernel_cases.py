"""Awkward shapes, dtypes and memory layouts for the tests of the low-rank kernels."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tensors import DEVICE, randn

# The interpreter runs a kernel program by program in Python: shapes stay small, examples few and always the same.
few = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

# Around the block sizes (16 … 256), primes, one; r over its whole range.
tokens = st.sampled_from([1, 2, 15, 16, 17, 31, 65, 127, 130])
features = st.sampled_from([1, 3, 16, 31, 63, 64, 65, 127, 129, 257])
ranks = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 31, 33, 64])
dtypes = st.sampled_from([torch.bfloat16, torch.float32])
layouts = st.sampled_from(["contiguous", "transposed", "strided", "expanded", "offset"])


def matrix(rows: int, cols: int, dtype: torch.dtype, layout: str = "contiguous", seed: int = 0) -> torch.Tensor:
    """A random rows × cols matrix on the test device that lies in memory as told."""
    if layout == "transposed":
        return randn(cols, rows, seed=seed, dtype=dtype).to(DEVICE).t()
    if layout == "strided":
        return _amid_nan(randn(rows, cols, seed=seed, dtype=dtype), slice(0, None, 2), slice(0, None, 3))
    if layout == "expanded":
        return randn(1, cols, seed=seed, dtype=dtype).to(DEVICE).expand(rows, cols)
    if layout == "offset":  # neither base address nor row length divides by anything
        return _amid_nan(randn(rows, cols, seed=seed, dtype=dtype), slice(1, 1 + rows), slice(3, 3 + cols))
    return randn(rows, cols, seed=seed, dtype=dtype).to(DEVICE)


def _amid_nan(values: torch.Tensor, rows: slice, cols: slice) -> torch.Tensor:
    """A view of a larger matrix that is NaN elsewhere, so that reading past an edge shows even where it is times 0.

    Torch's own bf16 product does so on CPUs with AMX: compare with torch on `.contiguous()` copies.
    """
    height, width = values.shape
    around = torch.full((2 * height + 260, 3 * width + 260), float("nan"), dtype=values.dtype, device=DEVICE)
    view = around[rows, cols][:height, :width]
    view.copy_(values)
    return view


def poisoned(rows: int, cols: int) -> torch.Tensor:
    """A gradient buffer between two rows of NaN that a wrong offset would touch, filled with known numbers."""
    around = torch.full((rows + 2, cols), float("nan"), device=DEVICE)
    around[1:-1] = randn(rows, cols, seed=77, dtype=torch.float32).to(DEVICE)
    return around


def double(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same numbers on the CPU in float64."""
    return [t.detach().cpu().double() for t in tensors]
