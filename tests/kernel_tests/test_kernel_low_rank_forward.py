"""The Triton kernel of p = x Aᵀ, against float64 and torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from kernel_cases import double, dtypes, features, few, layouts, matrix, ranks, tokens
from tensors import BF16, DEVICE, assert_as_good, error, fp32_rounding

from hdpissa.kernels import api, reference

pytestmark = pytest.mark.usefixtures("one_thread")


def check(T, I, R, dtype, layout="contiguous", layout_A="contiguous"):
    x, A = matrix(T, I, dtype, layout, seed=1), matrix(R, I, torch.float32, layout_A, seed=2)
    found = api.low_rank_forward(x, A, impl="triton")
    plain = reference.low_rank_forward(x.contiguous(), A.contiguous())
    assert (found.dtype, found.device) == (dtype, x.device)
    x64, A64 = double(x, A.to(dtype))  # the product is in x's dtype, so rounding A is part of it
    what = f"{T, I, R, dtype, layout, layout_A}"
    assert_as_good(found, plain, x64 @ A64.T, what, fp32_rounding(x64, A64.T))


@few
@given(tokens, features, ranks, dtypes, layouts, layouts)
def test_low_rank_forward(T, I, R, dtype, layout, layout_A):
    check(T, I, R, dtype, layout, layout_A)


@pytest.mark.parametrize("R", [65, 127, 256, 257])
def test_wide_slices(R):
    """More r than one program holds (256) goes over a second axis of the grid."""
    check(33, 70, R, BF16)


@pytest.mark.parametrize("T", [4096, 8192 + 17])
def test_many_tokens(T):
    """The token block grows with the number of tokens."""
    check(T, 33, 3, BF16)


@pytest.mark.parametrize(("T", "R"), [(0, 4), (4, 0)])
def test_nothing_to_do(T, R):
    check(T, 8, R, BF16)


def test_docstring_example():
    x, A = torch.tensor([[1.0, 2]], device=DEVICE), torch.tensor([[3.0, 4]], device=DEVICE)
    assert api.low_rank_forward(x, A, impl="triton").tolist() == [[11]]


def test_features_must_agree():
    with pytest.raises(ValueError, match="x has 5 features, A 6"):
        api.low_rank_forward(matrix(3, 5, BF16), matrix(2, 6, torch.float32), impl="triton")


def test_a_bf16_sum_would_be_seen():
    """The control of the tolerance: adding up in bf16, as an accumulator of the wrong type would, fails it."""
    x, A = matrix(16, 257, BF16, seed=1), matrix(4, 257, torch.float32, seed=2)
    x64, A64 = double(x, A.to(BF16))
    total = torch.zeros(16, 4, dtype=BF16)
    for i in range(257):
        total += torch.outer(x[:, i].cpu(), A[:, i].cpu().to(BF16))
    truth, plain = x64 @ A64.T, reference.low_rank_forward(x, A)
    assert error(total, truth) > 4 * error(plain.cpu(), truth)
    with pytest.raises(AssertionError):
        assert_as_good(total, plain, truth, rounding=fp32_rounding(x64, A64.T))


def test_tf32_products_would_be_seen():
    """The same for fp32 operands, of which TF32 takes 10 bits, at the longest sum of these tests."""
    x, A = (matrix(rows, 257, torch.float32, seed=rows).cpu() for rows in (16, 4))
    x64, A64 = double(x, A)
    cut = [(t.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) for t in (x, A)]
    with pytest.raises(AssertionError):
        assert_as_good(cut[0] @ cut[1].T, x @ A.T, x64 @ A64.T, rounding=fp32_rounding(x64, A64.T))
