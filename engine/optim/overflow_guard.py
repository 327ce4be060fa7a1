"""How far a step can change W at most, known before anything is written.

A step is taken by all ranks in full or by none. Gradients are voted on; what could still go wrong is an
overflow in the update itself, after some weights are already written. It is excluded beforehand, from numbers that
the host has (no look at the weights, no waiting for the device):

    |Δ| ≤ lr · C                                       C bounds Adam's m̂ / (√v̂ + ε), see `adam_bound`
    |D| ≤ Q · (|ΔB| max|A| + max|B| |ΔA| + |ΔB| |ΔA|)  Q = S·r, the length of the products
    |W| ≤ max|W| at the start + s · the |D| of all steps so far

The bounds are loose by orders of magnitude and still far below what fp32 holds: with the defaults W's bound grows by
less than 1 in a step, so that only absurd learning rates (1e38, nan) are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The largest fp32 whose bf16 half, rounded half up, is finite (0x7F7F7FFF).
MAX_WEIGHT = (2**24 - 2**15 - 1) * 2.0**104
# A gradient whose square is still finite in fp32.
MAX_GRADIENT = 2.0**63
# Room for rounding: in Adam, of bf16 (2⁻⁸) and TF32 factors and deltas, and in sums of up to 2¹⁶ products (2⁻⁸).
MARGIN = 1.05


def adam_bound(betas: tuple[float, float], eps: float, step: int, largest_grad: float) -> float:
    """Most that |m̂| / (√v̂ + ε) can be after `step` updates with gradients of at most `largest_grad`.

    With m = (1−β₁) Σ β₁ᵏ g_k and v = (1−β₂) Σ β₂ᵏ g_k² over the t gradients so far (k counts back from the last),
    Cauchy and Schwarz give, for q = β₁² / β₂,

        |Σ β₁ᵏ g_k| = |Σ q^(k/2) · β₂^(k/2) g_k| ≤ √(Σ qᵏ) · √(Σ β₂ᵏ g_k²)

        |m̂| / √v̂ ≤ C(t) = (1−β₁) / (1−β₁ᵗ) · √((1−β₂ᵗ) / (1−β₂)) · √(Σ_{k<t} qᵏ)

    C(1) = 1, and it tends to 7.27 for the default betas. fp32 loses what is below 2⁻¹²⁶ of a new g² and of an old v,
    at most 2⁻¹²⁵ per step and 2⁻¹²⁵ / (1−β₂) in all, so that √v̂ may be too small by g₀ = √(2⁻¹²⁵) / (1−β₂): that
    adds C g₀ / ε, nothing for any usual ε.

    For β₁² ≥ β₂ the sum grows with t without end, and rightly so: m outlives v. There |m̂| ≤ max|g| still holds, and
    with it the bound max|g| / ε. The smaller of both is returned.
    """
    beta1, beta2 = betas
    by_eps = largest_grad / eps
    if beta2 == 0:
        return by_eps
    total = _geometric(beta1 * beta1 / beta2, step)
    corrections = (1 - beta1) / (1 - beta1**step) * math.sqrt((1 - beta2**step) / (1 - beta2))
    bound = corrections * math.sqrt(total)
    lost = math.sqrt(2.0**-125) / (1 - beta2)
    return min(bound * (1 + lost / eps), by_eps)


def max_change(lr: float, betas: tuple[float, float], eps: float, step: int, largest_grad: float) -> float:
    """Bound of |ΔA| and |ΔB|; inf where even Adam's own factor lr / (1−β₁ᵗ) is no fp32 number."""
    if not lr / (1 - betas[0] ** step) <= MAX_WEIGHT:
        return math.inf
    return lr * MARGIN * adam_bound(betas, eps, step, largest_grad)


def _geometric(q: float, terms: int) -> float:
    """1 + q + … of so many terms; inf where a float cannot hold it."""
    if q == 1:
        return float(terms)
    try:
        return (1 - q**terms) / (1 - q)
    except OverflowError:
        return math.inf


@dataclass
class WeightBound:
    """Of one target: the largest |A|, |B| and |W| on any rank, Q = S·r, and s.

    `W` is the running bound; the others never change.
    """

    name: str
    A: float
    B: float
    W: float
    width: int
    scale: float


class OverflowGuard:
    """The running bounds of all targets.

    Args:
        weights: at the start of the run.
        second_order: whether ΔB ΔA is part of the delta.
    """

    def __init__(self, weights: Sequence[WeightBound], *, second_order: bool) -> None:
        self.weights = list(weights)
        self.second_order = second_order

    def _delta(self, bound: WeightBound, change: float) -> float:
        second = change * change if self.second_order else 0.0
        return MARGIN * bound.width * (change * (bound.A + bound.B) + second)

    def overflowing(self, change: float) -> str | None:
        """The first target that a step with |ΔA|, |ΔB| ≤ `change` could carry beyond fp32; None if there is none."""
        for e in self.weights:
            D = self._delta(e, change)
            after = e.W + MARGIN * e.scale * D
            if not (change <= MAX_WEIGHT and D <= MAX_WEIGHT and after <= MAX_WEIGHT):  # also false for nan
                return e.name
        return None

    def grow(self, change: float) -> None:
        """Takes such a step into account."""
        for e in self.weights:
            e.W += MARGIN * e.scale * self._delta(e, change)
