"""The Triton kernel of q = dy B and grad B += dyᵀ p, against float64 and torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from kernel_cases import double, dtypes, features, few, layouts, matrix, poisoned, ranks, tokens
from tensors import BF16, DEVICE, assert_as_good, fp32_rounding

from hdpissa.kernels import api, reference

pytestmark = pytest.mark.usefixtures("one_thread")


def check(T, O, R, dtype, layout="contiguous", layout_p="contiguous", *, with_q=False):
    dy, p = matrix(T, O, dtype, layout, seed=1), matrix(T, R, dtype, layout_p, seed=2)
    B = matrix(O, R, torch.float32, seed=3)
    given_q = matrix(T, R, dtype, seed=4) if with_q else None
    found, plain = poisoned(O, R), poisoned(O, R)
    start = found[1:-1].cpu().double()
    q = api.low_rank_grad_B_(found[1:-1], dy, p, B, given_q, impl="triton")
    torch_q = reference.low_rank_grad_B_(plain[1:-1], dy.contiguous(), p.contiguous(), B, given_q)
    dy64, p64, B64 = double(dy, p, B.to(dtype))
    what = f"{T, O, R, dtype, layout, layout_p, with_q}"
    assert_as_good(found[1:-1], plain[1:-1], start + dy64.T @ p64, "grad B " + what, fp32_rounding(dy64.T, p64, start))
    assert bool(found[[0, -1]].isnan().all())
    if with_q:
        assert q is given_q
    else:
        assert q.dtype == dtype
        assert_as_good(q, torch_q, dy64 @ B64, "q " + what, fp32_rounding(dy64, B64))


@few
@given(tokens, features, ranks, dtypes, layouts, layouts)
def test_low_rank_grad_B(T, O, R, dtype, layout, layout_p):
    check(T, O, R, dtype, layout, layout_p)


@pytest.mark.parametrize(("R", "dtype"), [(65, BF16), (256, BF16), (17, torch.float32)])
def test_wide_slices_read_dy_twice(R, dtype):
    check(33, 70, R, dtype)


def test_q_that_is_there_already():
    check(33, 70, 5, BF16, with_q=True)


def test_strided_p():
    """p of a group of Linears is a block of columns."""
    dy, B = matrix(20, 30, BF16, seed=1), matrix(30, 4, torch.float32, seed=3)
    p = matrix(20, 12, BF16, seed=2)[:, 4:8]
    results = [torch.zeros(30, 4, device=DEVICE) for _ in range(2)]
    api.low_rank_grad_B_(results[0], dy, p, B, impl="triton")
    api.low_rank_grad_B_(results[1], dy, p.contiguous(), B, impl="triton")
    assert torch.equal(*results)


@pytest.mark.parametrize("T", [129, 300])
def test_runs_of_tokens(T):
    """Few features leave processors idle, so the tokens are cut into runs; the last one is short."""
    check(T, 5, 2, torch.float32)


def test_no_tokens():
    grad = poisoned(5, 2)
    dy, p, B = matrix(0, 5, BF16), matrix(0, 2, BF16), matrix(5, 2, torch.float32)
    assert api.low_rank_grad_B_(grad[1:-1], dy, p, B, impl="triton").shape == (0, 2)
    assert torch.equal(grad[1:-1], poisoned(5, 2)[1:-1])


def test_docstring_example():
    dy, p, B, grad = (torch.tensor([[v]], device=DEVICE) for v in (2.0, 11.0, 5.0, 1.0))
    assert api.low_rank_grad_B_(grad, dy, p, B, impl="triton").tolist() == [[10]]
    assert grad.tolist() == [[23]]


def test_bad_arguments():
    dy, p, B, grad = matrix(3, 5, BF16), matrix(3, 2, BF16), matrix(5, 2, torch.float32), torch.zeros(5, 2)
    grad = grad.to(DEVICE)
    for arguments, message in (
        ((grad[:4], dy, p, B), r"grad B is \(4, 2\)"),
        ((grad, dy, p[:2], B), r"p is \(2, 2\), must be \(3, 2\)"),
        ((grad.bfloat16(), dy, p, B), "must be float32"),
        ((torch.zeros(2, 5, device=DEVICE).t(), dy, p, B), "grad_B must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            api.low_rank_grad_B_(*arguments, impl="triton")
