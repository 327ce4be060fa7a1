"""The Triton kernel of grad A += qᵀ x, against float64 and torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from kernel_cases import double, dtypes, features, few, layouts, matrix, poisoned, ranks, tokens
from tensors import BF16, DEVICE, assert_as_good, fp32_rounding

from hdpissa.kernels import api, reference

pytestmark = pytest.mark.usefixtures("one_thread")


def check(T, I, several_r, dtype, layout="contiguous", layout_q="contiguous"):
    """One reading of x for the slices of several Linears; gradients are added to, neighbours stay untouched."""
    x = matrix(T, I, dtype, layout, seed=1)
    qs = [matrix(T, R, dtype, layout_q, seed=10 + R) for R in several_r]
    found, plain = ([poisoned(R, I) for R in several_r] for _ in range(2))
    before = [f[1:-1].cpu().double() for f in found]
    api.low_rank_grad_A_([f[1:-1] for f in found], qs, x, impl="triton")
    reference.low_rank_grad_A_([f[1:-1] for f in plain], [q.contiguous() for q in qs], x.contiguous())
    for grad, torch_grad, start, q in zip(found, plain, before, qs, strict=True):
        x64, q64 = double(x, q)
        what = f"{T, I, several_r, dtype, layout, layout_q}"
        rounding = fp32_rounding(q64.T, x64, start)
        assert_as_good(grad[1:-1], torch_grad[1:-1], start + q64.T @ x64, what, rounding)
        assert bool(grad[[0, -1]].isnan().all())


@few
@given(tokens, features, ranks, dtypes, layouts, layouts)
def test_low_rank_grad_A(T, I, R, dtype, layout, layout_q):
    check(T, I, [R], dtype, layout, layout_q)


@pytest.mark.parametrize("several_r", [[16, 16, 16], [3, 1], [64, 2, 33]])
def test_linears_that_share_x(several_r):
    check(37, 70, several_r, BF16)


@pytest.mark.parametrize("R", [65, 256])
def test_wide_slices(R):
    check(33, 31, [R], BF16)


@pytest.mark.parametrize("T", [129, 300])
def test_runs_of_tokens(T):
    """Few features leave processors idle, so the tokens are cut into runs; the last one is short."""
    check(T, 5, [2], torch.float32)


def test_same_bits_every_time():
    x, q = matrix(130, 70, BF16, seed=1), matrix(130, 16, BF16, seed=2)
    results = []
    for _ in range(2):
        grad = torch.zeros(16, 70, device=DEVICE)
        api.low_rank_grad_A_([grad], [q], x, impl="triton")
        results.append(grad)
    assert torch.equal(*results)


def test_no_tokens():
    grad = poisoned(2, 5)
    api.low_rank_grad_A_([grad[1:-1]], [matrix(0, 2, BF16)], matrix(0, 5, BF16), impl="triton")
    assert torch.equal(grad[1:-1], poisoned(2, 5)[1:-1])


def test_docstring_example():
    q, x = torch.tensor([[10.0]], device=DEVICE), torch.tensor([[1.0, 2]], device=DEVICE)
    grad = torch.tensor([[1.0, 1]], device=DEVICE)
    api.low_rank_grad_A_([grad], [q], x, impl="triton")
    assert grad.tolist() == [[11, 21]]


def test_bad_arguments():
    x, q = matrix(3, 5, BF16), matrix(3, 2, BF16)
    good = torch.zeros(2, 5, device=DEVICE)
    for grads, qs, message in (
        ([good], [q, q], "1 gradients for 2 q"),
        ([good.t()], [q], r"grad A is \(5, 2\)"),
        ([good.bfloat16()], [q], "must be float32"),
        ([good], [matrix(4, 2, BF16)], "q has 4 tokens, x 3"),
        ([torch.zeros(5, 2, device=DEVICE).t()], [q], "must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            api.low_rank_grad_A_(grads, qs, x, impl="triton")
