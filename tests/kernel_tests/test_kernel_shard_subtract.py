"""The Triton kernel of W ← W − scale · D for a D that is there: bitwise torch's, in all three forms of W."""

from __future__ import annotations

import pytest
import torch
from delta_cases import FORMS, HeldShard, integers, patterns
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import few
from tensors import BF16, DEVICE, randn

from hdpissa.kernels import api, reference

pytestmark = pytest.mark.usefixtures("one_thread")
SCALE = 2 / 3  # a multiply-add that rounds once would show


def check(exact: torch.Tensor, D: torch.Tensor, form: str, scale: float = SCALE) -> None:
    """Kernel and torch leave the same bits, and count the same."""
    kernel, plain = HeldShard(exact, form), HeldShard(exact, form)
    D = D.to(DEVICE)
    api.shard_subtract_(kernel.parts, D, kernel.bad, scale=scale, impl="triton")
    reference.shard_subtract_(plain.parts, D, plain.bad, scale=scale)
    assert torch.equal(integers(kernel.exact()), integers(plain.exact()))
    assert kernel.bad.item() == plain.bad.item()


@few
@given(st.sampled_from([1, 2, 2047, 2048, 2049, 5000]), st.sampled_from(FORMS), st.sampled_from([torch.float32, BF16]))
def test_shard_subtract(numel, form, dtype):
    check(randn(numel, seed=1, dtype=torch.float32), randn(numel, seed=2).to(dtype), form)


@pytest.mark.parametrize("form", FORMS)
def test_every_bit_pattern(form):
    """W of every class against deltas of every class; with D = 0 finite numbers come back bit for bit."""
    exact = patterns()
    check(exact, torch.zeros_like(exact), form)
    check(exact, exact.flip(0), form, scale=1.0)
    shard = HeldShard(exact, form)
    api.shard_subtract_(shard.parts, torch.zeros_like(exact).to(DEVICE), shard.bad, scale=SCALE, impl="triton")
    assert torch.equal(integers(shard.exact().cpu()), integers(exact))
    assert shard.bad.item() == int((~exact.isfinite()).sum())


def test_docstring_example():
    shard = HeldShard(torch.tensor([10.0, 10.0]), "alone")
    D = torch.tensor([2.0, float("nan")], device=DEVICE)
    api.shard_subtract_(shard.parts, D, shard.bad, scale=2.0, impl="triton")
    assert (shard.exact().tolist(), shard.bad.tolist()) == ([6, 10], [1])


def test_nothing_to_do():
    none, bad = torch.empty(0, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    api.shard_subtract_((none,), none, bad, scale=1.0, impl="triton")
    assert not bad.any()


def test_bad_arguments():
    w, bad = torch.zeros(9, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for parts, D, message in (
        ((w,), w[:8], "D has 8 elements, the shard 9"),
        ((w,), w.double(), "must be fp32 or bf16"),
        ((w,), torch.zeros(18, device=DEVICE)[::2], "D must be contiguous"),
        ((w.bfloat16(),), w, "must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            api.shard_subtract_(parts, D, bad, scale=1.0, impl="triton")
