"""How far a step can go: the bound of Adam's update holds and is reached, and what it excludes is what overflows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hdpissa.engine.optim import overflow_guard
from hdpissa.engine.optim.overflow_guard import OverflowGuard, WeightBound, adam_bound, max_change
from hdpissa.kernels import api as kernels

DEFAULT = (0.9, 0.999)
INF = math.inf


def updates(grads: list[float], betas, eps: float, dtype=torch.float64) -> float:
    """m̂ / (√v̂ + ε) after these gradients."""
    m, v = torch.zeros(1, dtype=dtype), torch.zeros(1, dtype=dtype)
    for step, grad in enumerate(grads, 1):
        g = torch.tensor([grad], dtype=dtype)
        change = kernels.slice_adam_(m, v, g, step=step, lr=1.0, betas=betas, eps=eps, grad_scale=1.0)
    return change.item()


def worst(betas, steps: int) -> list[float]:
    """Gradients for which Cauchy and Schwarz have equality: g ∝ (β₁/β₂)ᵏ, k steps back."""
    return [(betas[0] / betas[1]) ** (steps - 1 - i) for i in range(steps)]


@pytest.mark.parametrize("betas", [DEFAULT, (0.8, 0.9), (0.5, 0.25), (0.95, 0.9), (0.0, 0.9)])
@pytest.mark.parametrize("steps", [1, 2, 7, 60])
def test_the_bound_is_reached(betas, steps):
    """So no smaller one is right; q = β₁²/β₂ is below 1, equal to it, and above."""
    assert updates(worst(betas, steps), betas, 0.0) == pytest.approx(adam_bound(betas, 1.0, steps, INF), rel=1e-9)


def test_the_defaults_in_numbers():
    """C = 0.1 / √0.001 / √(1 − 0.81/0.999) = 7.27 in the long run, 1 in the first step."""
    assert adam_bound(DEFAULT, 1e-8, 1, INF) == pytest.approx(1.0, rel=1e-6)
    assert adam_bound(DEFAULT, 1e-8, 10**6, INF) == pytest.approx(7.27, abs=0.005)


@pytest.mark.parametrize("betas", [(0.99, 0.9), (0.9, 0.0)])
def test_where_m_outlives_v_the_gradients_bound_it(betas):
    """A large gradient and then nothing: v is forgotten, m is not, and ε alone stands below."""
    steps = 400
    grads = [2.0] + [0.0] * (steps - 1)
    assert updates(grads, betas, 1e-3) <= adam_bound(betas, 1e-3, steps, 2.0) == 2.0 / 1e-3
    assert adam_bound(betas, 1e-3, 10**7, INF) == INF, "q to the 10⁷ is more than a float holds"


@given(
    betas=st.tuples(st.sampled_from([0.0, 0.5, 0.9, 0.99]), st.sampled_from([0.0, 0.5, 0.9, 0.999])),
    eps=st.sampled_from([1e-8, 1e-12, 1e-3]),
    scales=st.lists(st.integers(-44, 18), min_size=1, max_size=12),
    signs=st.lists(st.sampled_from([-1.0, 1.0, 0.0]), min_size=12, max_size=12),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_gradients_exceed_it_in_fp32(betas, eps, scales, signs):
    """From the smallest subnormal to where squares still fit; what fp32 loses of tiny squares is in the bound."""
    grads = [sign * 10.0**scale for sign, scale in zip(signs, scales, strict=False)]
    bound = adam_bound(betas, eps, len(grads), max(map(abs, grads)))
    assert abs(updates(grads, betas, eps, torch.float32)) <= overflow_guard.MARGIN * bound + 1e-30


def test_limits_are_fp32s():
    """The largest value whose bf16 half is finite, and the next; the largest harmless square."""
    largest = torch.tensor(overflow_guard.MAX_WEIGHT, dtype=torch.float32)
    assert largest.item() == overflow_guard.MAX_WEIGHT
    assert kernels.split_fp32(largest[None])[0].isfinite().all()
    assert not kernels.split_fp32(torch.nextafter(largest, torch.tensor(INF))[None])[0].isfinite().any()
    assert torch.tensor(overflow_guard.MAX_GRADIENT, dtype=torch.float32).square().isfinite()


def some(W: float = 1.0, scale: float = 1.0, second_order: bool = True) -> OverflowGuard:
    weights = [WeightBound("first", 0.5, 0.25, 1.0, 8, 1.0), WeightBound("second", 2.0, 1.0, W, 4, scale)]
    return OverflowGuard(weights, second_order=second_order)


def test_weights_grow_by_the_delta():
    """Q (ΔB A + B ΔA + ΔB ΔA) by hand: 4 · (0.1 · (2 + 1) + 0.1²) = 1.24, times s = 2; with the margins' 5 % twice."""
    found = some(W=3.0, scale=2.0)
    for steps in (1, 2):
        found.grow(0.1)
        grown = found.weights[1].W
        assert grown == pytest.approx(3 + steps * 1.05**2 * 2.48)
    first_order = some(W=3.0, scale=2.0, second_order=False)
    first_order.grow(0.1)
    grown = first_order.weights[1].W
    assert grown == pytest.approx(3 + 1.05**2 * 2.4)


def test_what_might_overflow_is_named():
    assert some().overflowing(1.0) is None
    assert some(W=3.3e38).overflowing(1.0) is None
    assert some(W=3.396e38, second_order=False).overflowing(1e34) == "second"
    assert some().overflowing(1e19) == "first", "ΔB ΔA"
    assert some(second_order=False).overflowing(1e19) is None
    assert some(scale=1e20, second_order=False).overflowing(1e19) == "second"
    for absurd in (1e38, INF, math.nan):
        assert some().overflowing(absurd) == "first"


def test_max_change():
    assert max_change(0.5, DEFAULT, 1e-8, 1, INF) == pytest.approx(0.5 * overflow_guard.MARGIN, rel=1e-6)
    assert max_change(0.0, DEFAULT, 1e-8, 1, INF) == 0.0
    assert max_change(1e38, DEFAULT, 1e-8, 1, 1.0) == INF, "lr / (1 − β₁) is beyond fp32"
    assert max_change(math.nan, DEFAULT, 1e-8, 1, 1.0) == INF
