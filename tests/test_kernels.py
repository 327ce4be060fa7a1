"""The torch kernels: worked examples, losslessness, float64 oracles."""

from __future__ import annotations

import inspect

import pytest
import torch
from tensors import BF16, F64, error, randn
from torch import nn

from hdpissa.kernels import api, reference

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the examples in the docstrings ---------------------------------------------------------------------------


def tensor(values, dtype=F64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def example_split_fp32():
    high, low = reference.split_fp32(tensor([1.00390625], torch.float32))
    assert (high.item(), low.item()) == (1.0078125, -32768)
    assert high.view(torch.int16).item() == 0x3F81


def example_low_rank_forward():
    assert reference.low_rank_forward(tensor([[1, 2]]), tensor([[3, 4]])).tolist() == [[11]]


def example_low_rank_backward():
    A, B = reference.low_rank_backward(tensor([[2]]), tensor([[1, 2]]), tensor([[11]]), tensor([[5]]))
    assert (A.tolist(), B.tolist()) == ([[10, 20]], [[22]])


def example_slice_adam_():
    m, v = torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64)
    change = reference.slice_adam_(m, v, tensor([4]), step=1, lr=0.1, betas=(0.9, 0.999), eps=0.0)
    assert change.item() == pytest.approx(0.1, rel=1e-12)


def example_delta_rows():
    factors = tensor([[0.5, 0]]), tensor([[1]]), tensor([[1, 2]]), tensor([[3]])
    assert reference.delta_rows(*factors, second_order=True).tolist() == [[2, 2]]
    assert reference.delta_rows(*factors, second_order=False).tolist() == [[2.5, 2]]


def public(module) -> set[str]:
    functions = inspect.getmembers(module, inspect.isfunction)
    return {name for name, f in functions if f.__module__ == module.__name__ and not name.startswith("_")}


@pytest.mark.parametrize("name", sorted(n for n in public(reference) if "Example:" in getattr(reference, n).__doc__))
def test_docstring_example(name):
    globals()[f"example_{name}"]()


def test_every_kernel_is_public_and_shown():
    """A kernel without an entry in the api is dead; one without an example is not specified."""
    assert public(reference) == public(api)
    assert {n for n in public(reference) if "Example:" not in getattr(reference, n).__doc__} == {"merge_fp32"}


# --- the choice of implementation -----------------------------------------------------------------------------

CALLS = {
    "split_fp32": ((randn(9, dtype=torch.float32),), {}),
    "merge_fp32": (reference.split_fp32(randn(9, dtype=torch.float32)), {}),
    "low_rank_forward": ((randn(5, 7), randn(2, 7)), {}),
    "low_rank_backward": ((randn(5, 3), randn(5, 7), randn(5, 2), randn(3, 2)), {}),
    "slice_adam_": (
        (torch.zeros(4), torch.zeros(4), torch.arange(4.0)),
        {"step": 1, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "grad_scale": 0.5},
    ),
    "delta_rows": ((randn(2, 7), randn(3, 2), randn(2, 7), randn(3, 2)), {"second_order": True}),
}


def called(function, name: str, **extra):
    args, hyper = CALLS[name]
    result = function(*(a.clone() for a in args), **hyper, **extra)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", sorted(public(api)))
def test_torch_is_the_reference(name):
    """On the CPU "auto" is torch, and "torch" is `reference` to the bit."""
    expected = called(getattr(reference, name), name)
    for extra in ({}, {"impl": "auto"}, {"impl": "torch"}):
        found = called(getattr(api, name), name, **extra)
        assert all(torch.equal(f, e) and f.dtype == e.dtype for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", sorted(public(api)))
def test_unknown_implementation_is_refused(name):
    with pytest.raises(ValueError, match=rf"impl='cuda' for {name}.*") as caught:
        called(getattr(api, name), name, impl="cuda")
    assert all(there in str(caught.value) for there in (*api.IMPLEMENTATIONS, "auto"))


# --- split_fp32 / merge_fp32 ----------------------------------------------------------------------------------


def from_bits(bits) -> torch.Tensor:
    return torch.as_tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def both_signs(bits: list[int]) -> torch.Tensor:
    return from_bits(bits + [b | 0x8000_0000 for b in bits])


NEAR_TIE = [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
FINITE = {
    "zero": [0],
    "subnormal": [1, 2, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1_0000, 0x1_8000, 0x40_0000, 0x7F_FFFF],
    "smallest normal": [0x0080_0000 + n for n in NEAR_TIE],
    "ties": [(upper << 16) + 0x8000 for upper in range(0, 0x7F80, 3)],
    "around ties": [(upper << 16) + n for upper in (0x3F7F, 0x3F80, 0x3F81, 0x4049) for n in NEAR_TIE],
    "largest": [0x7F7F_0000 + n for n in NEAR_TIE],  # from 0x7F7F8000 on they round to infinity
}
INFINITE = {"inf": [0x7F80_0000]}
NAN = {
    "nan": [0x7F80_8000, 0x7FA0_0000, 0x7FC0_0000, 0x7FC0_0001, 0x7FFF_7FFF],
    "nan that becomes infinity in the half": [0x7F80_0001, 0x7F80_7FFF],
    "nan that carries over into the sign": [0x7FFF_8000, 0x7FFF_8001, 0x7FFF_FFFF],
}
RANDOM = torch.randint(-(2**31), 2**31, (1_000_000,), generator=torch.Generator().manual_seed(0))
NUMBERS = torch.cat([both_signs(bits) for bits in (FINITE | INFINITE).values()])


def assert_lossless(w: torch.Tensor) -> None:
    high, low = reference.split_fp32(w)
    assert (high.dtype, low.dtype, high.shape, low.shape) == (BF16, torch.int16, w.shape, w.shape)
    # as integers: floats would call NaN different from itself and −0 the same as +0
    assert torch.equal(reference.merge_fp32(high, low).view(torch.int32), w.view(torch.int32))


@pytest.mark.parametrize("name", [*FINITE, *INFINITE, *NAN])
def test_split_is_lossless(name):
    assert_lossless(both_signs((FINITE | INFINITE | NAN)[name]))


def test_split_is_lossless_on_a_million_random_patterns():
    assert_lossless(from_bits(RANDOM))
    assert_lossless(from_bits(RANDOM[:6]).view(2, 3))


def test_high_half_is_the_bf16_cast_except_at_ties():
    """At ties it is the cast's neighbour away from zero where that rounds to even towards zero."""
    random = from_bits(RANDOM)
    w = torch.cat([NUMBERS, random[~random.isnan()]])
    high, cast = reference.split_fp32(w)[0].view(torch.int16).int(), w.to(BF16).view(torch.int16).int()
    bits = w.view(torch.int32)
    tie = bits & 0xFFFF == 0x8000
    even_below = tie & (bits >> 16 & 1 == 0)
    assert torch.equal(high[~even_below], cast[~even_below])
    assert torch.equal(high[even_below], cast[even_below] + 1)
    assert int(even_below.sum()) > 1000, "the patterns must hold ties of both kinds"
    assert int((tie & ~even_below).sum()) > 1000


def test_half_of_a_nan_is_not_always_a_nan():
    """The documented trap: what looks for NaN must look at the fp32 value."""
    half_of = {name: reference.split_fp32(both_signs(bits))[0] for name, bits in NAN.items()}
    assert bool(half_of["nan"].isnan().all())
    assert bool(half_of["nan that becomes infinity in the half"].isinf().all())
    carried = half_of["nan that carries over into the sign"]
    assert not carried.any()
    assert carried.signbit().tolist() == [True] * 3 + [False] * 3, "of the opposite sign"


# --- low_rank_backward ----------------------------------------------------------------------------------------


def by_autograd(dy, x, A, B):
    """Gradients of y = (x Aᵀ) Bᵀ: the low-rank path as everybody else writes it, in the tensors' dtype."""
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    ((x @ A.T) @ B.T).backward(dy)
    return A.grad, B.grad


def low_rank_case(dtype=F64, tokens=33, rows=12, cols=20, r=4):
    """dy, x in `dtype`; A, B in what training keeps them in."""
    keep = F64 if dtype == F64 else torch.float32
    dy, x = randn(tokens, rows, seed=1, dtype=dtype), randn(tokens, cols, seed=2, dtype=dtype)
    return dy, x, randn(r, cols, seed=3, dtype=keep), randn(rows, r, seed=4, dtype=keep)


def test_low_rank_backward_against_autograd():
    dy, x, A, B = low_rank_case()
    G = dy.T @ x  # of W, which the kernel never forms
    found = reference.low_rank_backward(dy, x, reference.low_rank_forward(x, A), B)
    for ours, theirs, dense in zip(found, by_autograd(dy, x, A, B), (B.T @ G, G @ A.T), strict=True):
        # 33 to 60 additions in float64, 1.1e-16 each: 7e-15 at the very worst
        assert error(ours, theirs) < 1e-14
        assert error(ours, dense) < 1e-14


@pytest.mark.parametrize("tokens", [1, 33, 512])
def test_low_rank_backward_in_bf16(tokens):
    """Not further from float64 than autograd in bf16 is (k = 1.1; measured 1.00), and near it at all.

    Three roundings to bf16 lie on the way of each gradient: the fixed factor, the thin product in the middle,
    the result; each is at most 2⁻⁹ of its value, 5.9e-3 in all. Measured 2.8e-3 to 3.8e-3.
    """
    dy, x, A, B = low_rank_case(BF16, tokens=tokens, rows=96, cols=160, r=8)
    truth = by_autograd(dy.double(), x.double(), A.double(), B.double())
    plain = by_autograd(dy, x, A.to(BF16), B.to(BF16))
    found = reference.low_rank_backward(dy, x, reference.low_rank_forward(x, A), B)
    for ours, theirs, true in zip(found, plain, truth, strict=True):
        assert ours.dtype == torch.float32, "gradients accumulate in the leaf's fp32"
        assert error(ours, true) <= 1.1 * error(theirs, true)
        assert error(ours, true) < 3 * 2**-9


# --- slice_adam_ ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_scale", [1.0, 0.25])
@pytest.mark.parametrize(("betas", "eps"), [((0.9, 0.999), 1e-8), ((0.8, 0.95), 0.3), ((0.0, 0.5), 1e-3)])
def test_slice_adam_against_torch(betas, eps, grad_scale):
    """torch.optim.Adam in float64, six steps of changing gradients and learning rate; eps large enough to tell."""
    parameter = nn.Parameter(torch.zeros(50, dtype=F64))
    adam = torch.optim.Adam([parameter], betas=betas, eps=eps)
    m, v = torch.zeros(50, dtype=F64), torch.zeros(50, dtype=F64)
    total = torch.zeros(50, dtype=F64)
    for step in range(1, 7):
        lr = 0.1 / step
        grad = randn(50, seed=step) * 10.0 ** (step - 3)
        kept = grad.clone()
        total += reference.slice_adam_(m, v, grad, step=step, lr=lr, betas=betas, eps=eps, grad_scale=grad_scale)
        assert torch.equal(grad, kept), "gradients are cleared by their owner, not here"
        adam.param_groups[0]["lr"] = lr
        parameter.grad = kept * grad_scale
        adam.step()
        # the same formula in another order: a few roundings of 1.1e-16 a step
        torch.testing.assert_close(-total, parameter.data, rtol=1e-13, atol=1e-15)
    state = adam.state[parameter]
    torch.testing.assert_close(m, state["exp_avg"], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(v, state["exp_avg_sq"], rtol=1e-13, atol=1e-15)


def test_slice_adam_in_fp32():
    """Not further from float64 than torch's Adam in fp32 is (k = 2; measured 0.9)."""
    hyper = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}

    def ours(dtype):
        m, v, total = (torch.zeros(2000, dtype=dtype) for _ in range(3))
        for step in range(1, 6):
            total = total + reference.slice_adam_(m, v, randn(2000, seed=step, dtype=dtype), step=step, **hyper)
        return total

    def torchs(dtype):
        parameter = nn.Parameter(torch.zeros(2000, dtype=dtype))
        adam = torch.optim.Adam([parameter], **hyper)
        for step in range(1, 6):
            parameter.grad = randn(2000, seed=step, dtype=dtype)
            adam.step()
        return -parameter.data

    truth = torchs(F64)
    assert error(ours(torch.float32), truth) <= 2 * error(torchs(torch.float32), truth)


# --- delta_rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 11])
@pytest.mark.parametrize("second_order", [True, False])
def test_delta_rows_against_the_sum_over_slices(second_order, rows):
    """Σ_i (ΔB_i A_i + B_i ΔA_i − ΔB_i ΔA_i), slice by slice, in float64."""
    slices, r, cols = 3, 2, 13
    A, dA = randn(slices, r, cols, seed=1), randn(slices, r, cols, seed=2)
    B, dB = randn(slices, rows, r, seed=3), randn(slices, rows, r, seed=4)
    expected = torch.zeros(rows, cols, dtype=F64)
    for i in range(slices):
        expected += dB[i] @ A[i] + B[i] @ dA[i]
        expected -= dB[i] @ dA[i] if second_order else 0
    if second_order:
        after = sum((B[i] - dB[i]) @ (A[i] - dA[i]) for i in range(slices))
        torch.testing.assert_close(expected, sum(B[i] @ A[i] for i in range(slices)) - after)
    side_by_side = [t.movedim(0, 1).reshape(rows, slices * r) for t in (dB, B)]
    dB_CQ, B_CQ = side_by_side
    found = reference.delta_rows(dA.flatten(0, 1), dB_CQ, A.flatten(0, 1), B_CQ, second_order=second_order)
    assert found.shape == (rows, cols)
    # 18 products of numbers around 1, rounded to 1.1e-16 each
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
