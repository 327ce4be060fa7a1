"""The Triton kernel of Adam over flat buffers, against float64 and torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import few
from tensors import BF16, DEVICE, assert_as_good, randn

from hdpissa.kernels import api, reference

pytestmark = pytest.mark.usefixtures("one_thread")
HYPER = {"betas": (0.9, 0.999), "eps": 1e-8}


def run(function, numel, dtype, *, steps=3, wire=None, hyper=HYPER, **more):
    """Moments and Δ after a few steps of changing gradients, learning rates and scales."""
    moments = [torch.zeros(numel, dtype=dtype, device=DEVICE) for _ in range(2)]
    for step in range(1, steps + 1):
        grad = (randn(numel, seed=step) * 10.0 ** (2 * step - 5)).float().to(dtype).to(DEVICE)
        kept = grad.clone()
        extra = {} if wire is None else {"dtype": wire}
        delta = function(*moments, grad, step=step, lr=1e-3 / step, grad_scale=0.5 * step, **hyper, **extra, **more)
        assert torch.equal(grad, kept), "gradients are cleared by their owner, not here"
    return *moments, delta


def check(numel, **options) -> None:
    found = run(api.slice_adam_, numel, torch.float32, impl="triton", **options)
    plain = run(reference.slice_adam_, numel, torch.float32, **options)
    truth = [t.cpu() for t in run(reference.slice_adam_, numel, torch.float64, **{**options, "wire": None})]
    for name, ours, theirs, true in zip(("m", "v", "Δ"), found, plain, truth, strict=True):
        assert ours.dtype == theirs.dtype
        assert_as_good(ours, theirs, true, f"{name} {numel} {options}")


@few
@given(st.sampled_from([1, 2, 1023, 1024, 1025, 3000]), st.sampled_from([None, torch.float32, BF16]))
def test_slice_adam(numel, wire):
    check(numel, wire=wire)


@pytest.mark.parametrize("hyper", [{"betas": (0.0, 0.5), "eps": 1e-3}, {"betas": (0.8, 0.95), "eps": 0.3}])
def test_other_hyper_parameters(hyper):
    check(100, hyper=hyper)


def test_a_silent_gradient_changes_nothing():
    m, v, g = (torch.zeros(10, device=DEVICE) for _ in range(3))
    delta = api.slice_adam_(m, v, g, step=5, lr=1e-3, impl="triton", **HYPER)
    assert not torch.stack([m, v, delta]).any()


def test_docstring_example():
    m, v = torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    four = torch.tensor([4.0], device=DEVICE)
    delta = api.slice_adam_(m, v, four, step=1, lr=0.1, betas=(0.9, 0.999), eps=0.0, impl="triton")
    assert delta.item() == pytest.approx(0.1, rel=1e-6)


def test_nothing_to_do():
    none = torch.empty(0, device=DEVICE)
    assert api.slice_adam_(none, none, none, step=1, lr=0.1, impl="triton", **HYPER).shape == (0,)


def test_bad_arguments():
    z = torch.zeros(6, device=DEVICE)
    for tensors, extra, message in (
        ((z, z.bfloat16(), z), {}, "exp_avg_sq is torch.bfloat16"),
        ((z[:3], z, z), {}, r"exp_avg is \(3,\), grad \(6,\)"),
        ((z, z, torch.zeros(12, device=DEVICE)[::2]), {}, "grad must be contiguous"),
        ((z, z, z), {"dtype": torch.float16}, "must be fp32 or bf16"),
    ):
        with pytest.raises(ValueError, match=message):
            api.slice_adam_(*tensors, step=1, lr=0.1, impl="triton", **HYPER, **extra)
