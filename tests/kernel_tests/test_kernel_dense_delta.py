"""The Triton kernel of D = ΔB (A − ΔA) + B ΔA on a flat range, against float64 and torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from delta_cases import Case, cases
from hypothesis import given
from kernel_cases import few
from tensors import BF16, DEVICE, assert_as_good, error

from hdpissa.kernels import api, delta_tile, reference

pytestmark = pytest.mark.usefixtures("one_thread")


def both(case: Case, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """By the kernel, by torch."""
    arguments = {"numel": case.numel, "dtype": dtype, **case.where}
    found = api.dense_delta(*case.factors(), impl="triton", **arguments)
    assert (found.dtype, found.shape, found.device.type) == (dtype, (case.numel,), DEVICE.type)
    return found, by_torch(case, dtype)


def by_torch(case: Case, dtype=torch.float32) -> torch.Tensor:
    return reference.dense_delta(*case.factors(), numel=case.numel, dtype=dtype, **case.where)


FEW = 64


def check(case: Case, dtype=torch.float32) -> None:
    """The rule for kernels; torch's error on a few elements is luck, so there its largest of 4096 like them counts."""
    found, plain = both(case, dtype)
    if case.numel >= FEW:
        assert_as_good(found, plain, case.truth(), str(case))
        return
    like = dataclasses.replace(case, cols=64, start=0, numel=4096)
    torch_error = (by_torch(like, dtype).cpu().double() - like.truth()).abs().max()
    assert (found.cpu().double() - case.truth()).abs().max() <= 2 * torch_error, case


@few
@given(cases())
def test_dense_delta(case):
    """Over torch's own error, on 64 such cases: 2.2 at Q = 1 (where both are below two roundings of the result, and
    `assert_as_good` counts one for torch), at most 1.9 up to 4, 1.6 up to 16, 1.4 at 33, 0.9 from 64 on.
    """
    check(case)


@pytest.mark.parametrize("Q", [128, 257])
def test_many_slices(Q):
    """Over torch's own error: measured 0.66 at Q = 128, 0.55 at 300; the matrix units' sums are short."""
    check(Case(Q=Q, cols=130, start=7, numel=130 * 5))


def test_bf16_result():
    check(Case(Q=20, cols=70, start=3, numel=500), BF16)


SIZES = [
    (1e-12, 1e-12, 0.1, 0.1),
    (1e-2, 1e4, 1e4, 1e-12),
    (1.0, 1e-10, 1e-3, 1e3),
    (1e-9, 1e9, 1e-9, 1e9),
    (0.0, 1e-5, 1.0, 1.0),
    (1e-20, 1.0, 1.0, 1e-20),  # a silent direction: the two terms are 40 decades apart
    (1e-30, 2e-5, 0.1, 1e-9),
]


@pytest.mark.parametrize(("width", "Q"), [("wide", 16), ("narrow", 48)])
def test_aligned_tiles(width, Q, monkeypatch):
    """Sizes of real layers, more tile rows than share a group, in every set of blocks whatever the chip."""
    monkeypatch.setattr(delta_tile, "width_for", lambda device, *divisible: width)
    monkeypatch.setattr(delta_tile, "GROUP", 2)
    check(Case(Q=Q, cols=272, start=16, numel=272 * 400, seed=1))


@pytest.mark.parametrize("sizes", SIZES)
def test_magnitudes(sizes):
    """fp16 reaches from 6e-8 to 65504; the factors go through it and may lie anywhere."""
    check(Case(Q=33, cols=70, start=5, numel=300, sizes=sizes))


@pytest.mark.parametrize("second_order", [True, False])
def test_magnitudes_that_differ_from_row_to_row(second_order):
    """Every row of B and every column of A has its own size, over 16 decades; powers of two, so D has it exactly."""
    case = Case(Q=24, cols=65, start=0, numel=65 * 40, second_order=second_order)
    dA, dB, A, B = case.factors()
    by_row = torch.linspace(-26, 26, 40, device=DEVICE).round().exp2()[:, None]
    by_col = torch.linspace(26, -26, 65, device=DEVICE).round().exp2()
    factors = dA * by_col, dB * by_row, A * by_col, B * by_row
    arguments = {"start": 0, "numel": 65 * 40, "second_order": second_order}
    found = api.dense_delta(*factors, impl="triton", **arguments).view(40, 65) / by_row / by_col
    plain = reference.dense_delta(*factors, **arguments).view(40, 65) / by_row / by_col
    assert_as_good(found.flatten(), plain.flatten(), case.truth())


@pytest.mark.parametrize("exponent", [6, 14, 20])
def test_slices_of_opposite_magnitudes(exponent):
    """A grows where ΔB shrinks, by 2^(2 · exponent) from slice to slice: the bound in `delta_tile`'s docstring."""
    case = Case(Q=32, cols=65, start=0, numel=65 * 40, second_order=False, sizes=(0.0, 2e-5, 0.1, 0.0))
    dA, dB, A, B = case.factors()
    by_slice = torch.tensor([exponent, -exponent] * 16, device=DEVICE).float().exp2()
    A, dB = A * by_slice[:, None], dB / by_slice
    arguments = {"start": 0, "numel": 65 * 40, "second_order": False}
    found, plain = (api.dense_delta(dA, dB, A, B, impl=impl, **arguments).view(40, 65) for impl in ("triton", "torch"))
    truth = case.truth().view(40, 65)  # powers of two cancel
    if 2 * exponent <= 15:
        assert_as_good(found, plain, truth)
    bound = 32 * 2.0**-37 * dB.abs().amax(1)[:, None] * A.abs().amax(0)
    few_roundings = 8 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert bool(((found.cpu().double() - truth).abs() <= bound.cpu() + few_roundings).all())


def test_a_division_into_ranges_changes_no_bit():
    """Any way to cut W into shards gives the same elements.

    The interpreter's products are numpy's, whose last bit depends on the place in the tile; a GPU's does not.
    """
    whole = Case(Q=40, cols=37, start=0, numel=37 * 30)
    dA, dB, A, B = whole.factors()
    D = api.dense_delta(dA, dB, A, B, numel=whole.numel, impl="triton", **whole.where)
    for start, stop in ((0, 1), (5, 300), (300, 301), (301, 1109), (1109, 1110)):
        rows = slice(start // 37, -(-stop // 37))
        part = api.dense_delta(
            dA, dB[rows], A, B[rows], start=start, numel=stop - start, second_order=True, impl="triton"
        )
        if DEVICE.type == "cuda":
            assert torch.equal(part, D[start:stop])
        else:
            assert (part - D[start:stop]).abs().max() <= 2**-22 * D.abs().max()


def test_strided_factors():
    """Slices arrive as blocks of a receive buffer: only the last dimension need be dense."""
    case = Case(Q=10, cols=33, start=4, numel=200)
    dense = case.factors()
    strided = [torch.cat([f, f], dim=1)[:, : f.shape[1]] for f in dense]
    arguments = {"numel": 200, "impl": "triton", **case.where}
    assert torch.equal(api.dense_delta(*dense, **arguments), api.dense_delta(*strided, **arguments))


def test_products_of_lower_precision_would_be_seen():
    """The control: fp16, bf16 or TF32 operands alone miss the tolerance by far."""
    case = Case(Q=128, cols=64, start=0, numel=64 * 16)
    truth, (_, plain) = case.truth(), both(case)
    for bits in (10, 7):
        rounded = [_round_to(f, bits) for f in case.factors()]
        low = reference.dense_delta(*rounded, numel=case.numel, **case.where)
        assert error(low.cpu(), truth) > 100 * error(plain.cpu(), truth)
        with pytest.raises(AssertionError):
            assert_as_good(low, plain, truth)


def _round_to(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x with so many bits behind the leading one: 10 is TF32 and fp16, 7 bf16."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent)


def test_docstring_example():
    factors = [torch.tensor(v, device=DEVICE) for v in ([[0.5, 0]], [[1.0]], [[1.0, 2]], [[3.0]])]
    for start, numel, second, expected in ((0, 2, True, [2, 2]), (0, 2, False, [2.5, 2]), (1, 1, True, [2])):
        found = api.dense_delta(*factors, start=start, numel=numel, second_order=second, impl="triton")
        assert found.tolist() == expected


def test_nothing_to_do():
    case = Case(Q=4, cols=5, start=10, numel=0)
    assert api.dense_delta(*case.factors(), numel=0, impl="triton", **case.where).shape == (0,)


def test_bad_arguments():
    case = Case(Q=4, cols=5, start=3, numel=9)
    dA, dB, A, B = case.factors()
    more = {"numel": 9, "impl": "triton", **case.where}
    for factors, extra, message in (
        ((dA[:3], dB, A, B), {}, r"dA is \(3, 5\), A \(4, 5\)"),
        ((dA, dB[:2], A, B), {}, "the range touches 3 rows of 4"),
        ((dA.double(), dB, A, B), {}, "dA is torch.float64"),
        ((dA.bfloat16(), dB, A, B), {}, "dA is torch.bfloat16, dB torch.float32"),
        ((dA, dB, A.t().contiguous().t(), B), {}, "A's last dimension must be contiguous"),
        ((dA, dB, A, B), {"dtype": torch.float16}, "must be fp32 or bf16"),
        ((dA, dB, A, B), {"start": -1}, "start is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            api.dense_delta(*factors, **(more | extra))
    assert dataclasses.replace(case, numel=0).rows == 1
