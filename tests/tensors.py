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


def assert_as_good(found: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, what: str = "") -> None:
    """The rule for kernels: an error of at most twice that of torch's own operation at the same dtype.

    A single number can come out exact by luck, so torch's error counts as one rounding of the result at least.
    """
    if not truth.numel():
        assert found.shape == truth.shape
        return
    assert found.shape == truth.shape, what
    assert bool(found.isfinite().all()), what
    least = torch.finfo(plain.dtype).eps / 2
    scale = truth.norm().item() or 1.0
    found_error = (found.cpu().double() - truth).norm().item() / scale
    plain_error = (plain.cpu().double() - truth).norm().item() / scale
    assert found_error <= 2 * max(plain_error, least), f"{what}: {found_error:.3g}, torch {plain_error:.3g}"
