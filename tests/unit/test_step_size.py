"""The learning rate with another S (docs/training.md): how large a step is when Adam's entries all have size η."""

from __future__ import annotations

import math

import pytest
import torch

ROWS, COLS, R, LR = 96, 64, 4, 2e-5


def slices(W, count):
    """(A_i, B_i) of the method, float64."""
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    root = sigma.sqrt()
    parts = [slice(i * R, (i + 1) * R) for i in range(count)]
    return sigma, [(root[p, None] * Vt[p], U[:, p] * root[p]) for p in parts]


def signs(*shape):
    return LR * (torch.randint(0, 2, shape, dtype=torch.float64) * 2 - 1)


def sizes(W, count):
    """‖Σ ΔB_i A_i‖ and ‖Σ B_i ΔA_i‖ with entries of ± η."""
    _, pairs = slices(W, count)
    of_B = sum(signs(ROWS, R) @ A for A, _ in pairs)
    of_A = sum(B @ signs(R, COLS) for _, B in pairs)
    return of_B.norm().item(), of_A.norm().item()


@pytest.mark.parametrize("count", [1, 4, 16])
def test_slices_add_up_as_the_sides_of_a_right_angle_do(count):
    torch.manual_seed(count)
    W = torch.randn(ROWS, COLS, dtype=torch.float64)
    sigma, _ = slices(W, count)
    total = sigma[: count * R].sum().item()
    assert sizes(W, count) == pytest.approx((LR * math.sqrt(ROWS * total), LR * math.sqrt(COLS * total)), rel=1e-9)


@pytest.mark.parametrize("count", [2, 16])
@pytest.mark.parametrize("decay", [0.0, 0.05, 1.0])
def test_the_rate_of_the_same_step_lies_between_both_ends(count, decay):
    """Beside 8 slices, for spectra that are flat, that fall, and that are over after a few values."""
    torch.manual_seed(0)
    U, _, Vt = torch.linalg.svd(torch.randn(ROWS, COLS, dtype=torch.float64), full_matrices=False)
    W = U @ torch.diag(torch.exp(-decay * torch.arange(COLS))).double() @ Vt
    same = sizes(W, 8)[0] / sizes(W, count)[0]  # the rate with which both steps have one size, over η
    ends = sorted((1.0, math.sqrt(8 / count)))
    assert ends[0] - 1e-6 <= same <= ends[1] + 1e-6
