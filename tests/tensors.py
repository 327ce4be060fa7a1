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


def fp32_rounding(a: torch.Tensor, b: torch.Tensor, start: torch.Tensor | None = None) -> float:
    """How far in ‖·‖ the roundings of fp32 sums may carry start + a b (float64, T × n times n × N), in any order.

    Each of n additions is off by at most eps times a partial sum, hence eps · Σ|a||b|: half of that where the hardware
    rounds to nearest, as CPUs do, all of it in matrix units that cut off. Up to 4 terms (16 to nearest) 2 √n eps is
    the worst case; beyond, roundings are as good as independent and add up like √n, not n. No order of summation,
    and so no instruction set, is assumed. In a hundred numbers, operands of 10 bits (TF32) are off by 5 times as much
    at n = 300, and by more below.
    """
    n = a.shape[1] + (start is not None)
    sizes = a.abs() @ b.abs() + (0 if start is None else start.abs())
    return 2 * n**0.5 * torch.finfo(torch.float32).eps * sizes.norm().item()


def assert_as_good(
    found: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, what: str = "", rounding: float = 0.0
) -> None:
    """The rule for kernels: an error of at most twice that of torch's own operation at the same dtype, and `rounding`.

    A single number can come out exact by luck, so torch's error counts as one rounding of the result at least.
    How well torch adds up depends on the CPU; `rounding` is what any order of summation may cost (`fp32_rounding`).
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
    limit = 2 * max(plain_error, least) + rounding / scale
    assert found_error <= limit, f"{what}: {found_error:.3g} > {limit:.3g}, torch {plain_error:.3g}"
