"""Seeded tensors and their relative error, for the tests of pure functions."""

from __future__ import annotations

import torch

F64, BF16 = torch.float64, torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where kernels are tested


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """‖found − truth‖ / ‖truth‖."""
    return ((found.double() - truth).norm() / truth.norm()).item()
