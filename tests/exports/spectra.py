"""Matrices with a known spectrum, and LAPACK's word on any."""

from __future__ import annotations

import numpy as np
import torch


def orthonormal(rows: int, cols: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, cols, generator=generator, dtype=torch.float64))[0]


def with_spectrum(rows: int, cols: int, sigma: list[float], seed: int = 0) -> torch.Tensor:
    k = len(sigma)
    return orthonormal(rows, k, seed) * torch.tensor(sigma, dtype=torch.float64) @ orthonormal(cols, k, seed + 1).T


def gaussian(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lapack(W: torch.Tensor):
    return [torch.from_numpy(part) for part in np.linalg.svd(W.double().numpy(), full_matrices=False)]
