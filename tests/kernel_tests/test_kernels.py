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


def example_low_rank_grad_B_():
    grad = tensor([[1]])
    assert reference.low_rank_grad_B_(grad, tensor([[2]]), tensor([[11]]), tensor([[5]])).tolist() == [[10]]
    assert grad.tolist() == [[23]]


def example_low_rank_grad_A_():
    grad = tensor([[1, 1]])
    reference.low_rank_grad_A_([grad], [tensor([[10]])], tensor([[1, 2]]))
    assert grad.tolist() == [[11, 21]]


def example_fused_linear():
    y, p = reference.fused_linear(tensor([[1, 2]]), tensor([[1, 0]]), tensor([[3, 4]]), tensor([5]))
    assert (y.tolist(), p.tolist()) == ([[6]], [[11]])


def example_slice_adam_():
    m, v = torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64)
    change = reference.slice_adam_(m, v, tensor([4]), step=1, lr=0.1, betas=(0.9, 0.999), eps=0.0)
    assert change.item() == pytest.approx(0.1, rel=1e-12)


FACTORS = tensor([[0.5, 0]]), tensor([[1]]), tensor([[1, 2]]), tensor([[3]])


def example_dense_delta():
    assert reference.dense_delta(*FACTORS, start=0, numel=2, second_order=True).tolist() == [2, 2]
    assert reference.dense_delta(*FACTORS, start=0, numel=2, second_order=False).tolist() == [2.5, 2]
    assert reference.dense_delta(*FACTORS, start=1, numel=1, second_order=True).tolist() == [2]


def example_delta_apply_():
    w, bad = tensor([10, 10]), torch.zeros(1, dtype=torch.int32)
    reference.delta_apply_((w,), *FACTORS, bad, start=0, scale=2.0, second_order=True)
    assert (w.tolist(), bad.tolist()) == ([6, 6], [0])


def example_shard_subtract_():
    w, bad = tensor([10, 10]), torch.zeros(1, dtype=torch.int32)
    reference.shard_subtract_((w,), tensor([2, float("nan")]), bad, scale=2.0)
    assert (w.tolist(), bad.tolist()) == ([6, 10], [1])


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


# --- the low-rank path ------------------------------------------------------------------------------------------


def by_autograd(dy, x, A, B):
    """Gradients of y = (x Aᵀ) Bᵀ: the low-rank path as everybody else writes it, in the tensors' dtype."""
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    ((x @ A.T) @ B.T).backward(dy)
    return A.grad, B.grad


def by_reference(dy, x, A, B):
    grad_A, grad_B = torch.zeros_like(A), torch.zeros_like(B)
    q = reference.low_rank_grad_B_(grad_B, dy, reference.low_rank_forward(x, A), B)
    reference.low_rank_grad_A_([grad_A], [q], x)
    return grad_A, grad_B


def low_rank_case(dtype=F64, tokens=33, rows=12, cols=20, r=4):
    """dy, x in `dtype`; A, B in what training keeps them in."""
    keep = F64 if dtype == F64 else torch.float32
    dy, x = randn(tokens, rows, seed=1, dtype=dtype), randn(tokens, cols, seed=2, dtype=dtype)
    return dy, x, randn(r, cols, seed=3, dtype=keep), randn(rows, r, seed=4, dtype=keep)


def test_low_rank_gradients_against_autograd():
    dy, x, A, B = low_rank_case()
    G = dy.T @ x  # of W, which the kernel never forms
    found = by_reference(dy, x, A, B)
    for ours, theirs, dense in zip(found, by_autograd(dy, x, A, B), (B.T @ G, G @ A.T), strict=True):
        # 33 to 60 additions in float64, 1.1e-16 each: 7e-15 at the very worst
        assert error(ours, theirs) < 1e-14
        assert error(ours, dense) < 1e-14


@pytest.mark.parametrize("tokens", [1, 33, 512])
def test_low_rank_gradients_in_bf16(tokens):
    """Not further from float64 than autograd in bf16 is (k = 1.1; measured 1.00), and near it at all.

    Three roundings to bf16 lie on the way of each gradient: the fixed factor, the thin product in the middle,
    the result; each is at most 2⁻⁹ of its value, 5.9e-3 in all. Measured 2.8e-3 to 3.8e-3.
    """
    dy, x, A, B = low_rank_case(BF16, tokens=tokens, rows=96, cols=160, r=8)
    truth = by_autograd(dy.double(), x.double(), A.double(), B.double())
    plain = by_autograd(dy, x, A.to(BF16), B.to(BF16))
    found = by_reference(dy, x, A, B)
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


# --- the delta --------------------------------------------------------------------------------------------------


def delta_case(slices=3, r=2, rows=11, cols=13):
    """((ΔA, ΔB, A, B) with slices side by side, the two forms of D by the sum over slices), float64."""
    A, dA = randn(slices, r, cols, seed=1), randn(slices, r, cols, seed=2)
    B, dB = randn(slices, rows, r, seed=3), randn(slices, rows, r, seed=4)
    first = sum(dB[i] @ A[i] + B[i] @ dA[i] for i in range(slices))
    second = first - sum(dB[i] @ dA[i] for i in range(slices))
    after = sum((B[i] - dB[i]) @ (A[i] - dA[i]) for i in range(slices))
    torch.testing.assert_close(second, sum(B[i] @ A[i] for i in range(slices)) - after)
    dB_CQ, B_CQ = (t.movedim(0, 1).reshape(rows, slices * r) for t in (dB, B))
    return (dA.flatten(0, 1), dB_CQ, A.flatten(0, 1), B_CQ), {True: second, False: first}


RANGES = [(0, 143), (0, 1), (142, 1), (5, 100), (13, 26), (20, 3), (12, 2), (60, 0)]


@pytest.mark.parametrize("block_elements", [1, 30, 2**20])
@pytest.mark.parametrize(("start", "numel"), RANGES)
@pytest.mark.parametrize("second_order", [True, False])
def test_delta_of_a_flat_range(second_order, start, numel, block_elements, monkeypatch):
    """Σ_i (ΔB_i A_i + B_i ΔA_i − ΔB_i ΔA_i) on ranges that begin and end within rows, in blocks of any size."""
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", block_elements)
    (dA, dB, A, B), D = delta_case()
    rows = slice(start // 13, -(-(start + numel) // 13) if numel else start // 13)
    factors, expected = (dA, dB[rows], A, B[rows]), D[second_order].flatten()[start : start + numel]
    found = reference.dense_delta(*factors, start=start, numel=numel, second_order=second_order, dtype=F64)
    # 18 products of numbers around 1, rounded to 1.1e-16 each
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    w, bad = randn(numel, seed=9), torch.zeros(1, dtype=torch.int32)
    before = w.clone()
    reference.delta_apply_((w,), *factors, bad, start=start, scale=0.3, second_order=second_order)
    torch.testing.assert_close(w, before - 0.3 * expected, rtol=1e-13, atol=1e-14)
    assert not bad.any()


def test_the_three_ways_to_hold_w_agree_to_the_bit():
    (dA, dB, A, B), _ = delta_case()
    factors = [t.float() for t in (dA, dB, A, B)]
    exact, bad = randn(143, seed=8, dtype=torch.float32), torch.zeros(1, dtype=torch.int32)
    high, low = reference.split_fp32(exact)
    master, half, alone = exact.clone(), high.clone(), exact.clone()
    for parts in ((high, low), (master, half), (alone,)):
        reference.delta_apply_(parts, *factors, bad, start=0, scale=2 / 3, second_order=True)
    D = reference.dense_delta(*factors, start=0, numel=143, second_order=True)
    assert torch.equal(alone, exact - 2 / 3 * D)
    assert torch.equal(master, alone)
    assert torch.equal(reference.merge_fp32(high, low), alone)
    assert torch.equal(half, high)


def test_what_is_not_finite_is_not_written():
    """The largest number overflows, a NaN spreads: old values stay, the others change, all are counted."""
    largest = torch.finfo(torch.float32).max
    w = torch.tensor([1.0, largest, 2.0, 3.0, float("nan")])
    D = torch.tensor([0.5, -largest, float("nan"), 1.0, 1.0])
    for parts in (reference.split_fp32(w), (w.clone(), reference.split_fp32(w)[0]), (w.clone(),)):
        bad = torch.tensor([7], dtype=torch.int32)
        reference.shard_subtract_(parts, D, bad, scale=1.0)
        found = reference.merge_fp32(*parts) if parts[0].dtype == BF16 else parts[0]
        assert found[:4].tolist() == [0.5, largest, 2.0, 2.0]
        assert bool(found[4].isnan())
        assert bad.tolist() == [10]


def test_tf32_is_for_gpus():
    factors = [t.float() for t in delta_case()[0]]
    with pytest.raises(ValueError, match="the torch version has fp32 only"):
        reference.delta_apply_(
            (randn(143, dtype=torch.float32),), *factors, torch.zeros(1, dtype=torch.int32),
            start=0, scale=1.0, second_order=True, precision="tf32",
        )  # fmt: skip
