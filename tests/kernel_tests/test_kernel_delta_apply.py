"""The Triton kernel of W ← W − scale · D on a shard: bitwise the subtraction of the same product, in all its forms."""

from __future__ import annotations

import pytest
import torch
from delta_cases import FORMS, Case, HeldShard, cases, integers, patterns
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import few
from tensors import BF16, DEVICE, assert_as_good, randn

from hdpissa.kernels import api, reference

pytestmark = pytest.mark.usefixtures("one_thread")
SCALE = 2 / 3  # a multiply-add that rounds once would show


def apply(case: Case, shard: HeldShard, *, scale=SCALE, factors=None, **more) -> torch.Tensor:
    api.delta_apply_(
        shard.parts, *(factors or case.factors()), shard.bad, scale=scale, impl="triton", **case.where, **more
    )
    return shard.exact()


def check(case: Case, form: str) -> None:
    exact = randn(case.numel, seed=99, dtype=torch.float32).to(DEVICE)
    found = apply(case, shard := HeldShard(exact, form))
    D = api.dense_delta(*case.factors(), numel=case.numel, impl="triton", **case.where)
    assert torch.equal(integers(found), integers(exact - SCALE * D)), f"{case} {form}"
    assert not shard.bad.any()


@few
@given(cases(), st.sampled_from(FORMS))
def test_delta_apply(case, form):
    check(case, form)


@pytest.mark.parametrize("form", FORMS)
def test_many_slices(form):
    check(Case(Q=128, cols=130, start=7, numel=130 * 3), form)


def test_error_of_the_new_weights():
    """Of W itself, which is 10⁴ times the delta: the last rounding is all that is left."""
    case = Case(Q=128, cols=130, start=7, numel=130 * 3)
    exact = randn(case.numel, seed=99, dtype=torch.float32).to(DEVICE)
    plain = HeldShard(exact, "alone")
    reference.delta_apply_(plain.parts, *case.factors(), plain.bad, scale=SCALE, **case.where)
    truth = exact.cpu().double() - SCALE * case.truth()
    assert_as_good(apply(case, HeldShard(exact, "split")), plain.exact(), truth)


@pytest.mark.parametrize("form", FORMS)
def test_every_bit_pattern_comes_back(form):
    """With D = 0 all finite numbers do; infinities and NaN stay as they are, and are counted."""
    exact = patterns()
    case = Case(Q=3, cols=17, start=5, numel=exact.numel(), sizes=(0.0, 0.0, 1.0, 1.0))
    shard = HeldShard(exact, form)
    found = apply(case, shard)
    assert torch.equal(integers(found.cpu()), integers(exact))
    assert shard.bad.item() == int((~exact.isfinite()).sum())


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_is_not_written(form):
    """A NaN in ΔB corrupts its row, and the largest number overflows: these keep their values, all others change."""
    case = Case(Q=5, cols=20, start=0, numel=200, sizes=(0.1, 0.1, 1.0, 1.0))
    dA, dB, A, B = case.factors()
    exact = randn(200, seed=99, dtype=torch.float32)
    dB[3, 2] = float("nan")
    exact[7] = torch.finfo(torch.float32).max
    dA[:, 7], A[:, 7], dB[0] = 0.0, -1e29, 100.0  # 5 · 100 · 1e29 is too much beside the largest number, not alone
    shard = HeldShard(exact, form)
    found = apply(case, shard, factors=[dA, dB, A, B]).cpu()
    kept = torch.zeros(200, dtype=torch.bool)
    kept[60:80] = kept[7] = True
    assert torch.equal(integers(found[kept]), integers(exact[kept]))
    assert bool((found != exact)[~kept].all())
    assert shard.bad.item() == 21


@pytest.mark.parametrize("wire", [torch.float32, BF16])
def test_tf32_is_rounded_to_ten_bits(wire):
    """The named option: relative error of D between 1e-5 and 1e-3, where fp32 has 1e-7."""
    case = Case(Q=128, cols=64, start=0, numel=64 * 16, wire=wire)
    zero = torch.zeros(case.numel)
    D, truth = -apply(case, HeldShard(zero, "alone"), scale=1.0, precision="tf32").cpu().double(), case.truth()
    error = ((D - truth).norm() / truth.norm()).item()
    assert 1e-5 < error < 1e-3
    exact = -apply(case, HeldShard(zero, "alone"), scale=1.0).cpu().double()
    assert (exact - truth).norm() < 1e-6 * truth.norm()


def test_docstring_example():
    factors = [torch.tensor(v, device=DEVICE) for v in ([[0.5, 0]], [[1.0]], [[1.0, 2]], [[3.0]])]
    shard = HeldShard(torch.tensor([10.0, 10.0]), "alone")
    assert apply(Case(1, 2, 0, 2), shard, scale=2.0, factors=factors).tolist() == [6, 6]


def test_nothing_to_do():
    case = Case(Q=4, cols=5, start=10, numel=0)
    bad = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    api.delta_apply_((torch.empty(0, device=DEVICE),), *case.factors(), bad, scale=1.0, impl="triton", **case.where)


def test_bad_arguments():
    case = Case(Q=4, cols=5, start=3, numel=9)
    w, bad = torch.zeros(9, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    half = w.bfloat16()
    for parts, counter, extra, message in (
        ((half,), bad, {}, "must be one of"),
        ((half, w), bad, {}, "must be one of"),
        ((w, half[:5]), bad, {}, "parts differ in shape"),
        ((torch.zeros(18, device=DEVICE)[::2],), bad, {}, "must be contiguous"),
        ((w,), bad.long(), {}, "bad must be one int32"),
        ((w,), bad, {"precision": "bf16"}, "precision='bf16'"),
    ):
        with pytest.raises(ValueError, match=message):
            api.delta_apply_(parts, *case.factors(), counter, scale=1.0, impl="triton", **case.where, **extra)
