"""The Triton kernel of (y, p) = (x Wᵀ + b, x Aᵀ), against float64 and torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import double, dtypes, features, few, layouts, matrix, ranks, tokens
from tensors import BF16, DEVICE, assert_as_good, fp32_rounding

from hdpissa.kernels import api, reference

pytestmark = pytest.mark.usefixtures("one_thread")


def check(x, W, A, bias, what):
    y, p = api.fused_linear(x, W, A, bias, impl="triton")
    plain_y, plain_p = reference.fused_linear(x.contiguous(), W, A, bias)
    x64, W64, A64 = double(x, W, A.to(x.dtype))
    shift = torch.zeros(1, dtype=torch.float64) if bias is None else bias.cpu().double()
    assert y.dtype == p.dtype == x.dtype
    assert_as_good(y, plain_y, x64 @ W64.T + shift, f"y {what}", fp32_rounding(x64, W64.T, shift))
    assert_as_good(p, plain_p, x64 @ A64.T, f"p {what}", fp32_rounding(x64, A64.T))


@few
@given(tokens, features, features, ranks, dtypes, layouts, st.booleans())
def test_forward(T, I, O, R, dtype, layout, with_bias):
    bias = matrix(1, O, dtype, seed=4)[0] if with_bias else None
    x, W, A = matrix(T, I, dtype, layout, seed=1), matrix(O, I, dtype, seed=2), matrix(R, I, torch.float32, seed=3)
    check(x, W, A, bias, (T, I, O, R, dtype, layout, with_bias))


@few
@given(tokens, features, features, ranks, dtypes)
def test_backward_is_the_same_product_transposed(T, I, O, R, dtype):
    dy, W, B = matrix(T, O, dtype, seed=1), matrix(O, I, dtype, seed=2), matrix(O, R, torch.float32, seed=3)
    check(dy, W.t(), B.t(), None, (T, I, O, R, dtype))


def test_many_tiles():
    """More blocks of tokens than share a group in the L2 cache, the last group being short."""
    x, W, A = matrix(9 * 128 + 5, 20, BF16, seed=1), matrix(300, 20, BF16, seed=2), matrix(3, 20, torch.float32)
    check(x, W, A, None, "many tiles")


def test_no_tokens():
    y, p = api.fused_linear(matrix(0, 5, BF16), matrix(3, 5, BF16), matrix(2, 5, torch.float32), impl="triton")
    assert (y.shape, p.shape) == ((0, 3), (0, 2))


def test_docstring_example():
    x, W, A, b = (torch.tensor(v, device=DEVICE) for v in ([[1.0, 2]], [[1.0, 0]], [[3.0, 4]], [5.0]))
    y, p = api.fused_linear(x, W, A, b, impl="triton")
    assert (y.tolist(), p.tolist()) == ([[6]], [[11]])


def test_bad_arguments():
    x, W, A = matrix(3, 5, BF16), matrix(4, 5, BF16), matrix(2, 5, torch.float32)
    for arguments, message in (
        ((x, W[:, :4], A), "x has 5 features, W 4, A 5"),
        ((x, W.float(), A), "W is torch.float32; must be bfloat16 or float32, all alike"),
        ((x, W, matrix(65, 5, torch.float32)), "r is 65, at most 64"),
    ):
        with pytest.raises(ValueError, match=message):
            api.fused_linear(*arguments, impl="triton")
