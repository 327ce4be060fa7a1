"""Public kernel functions and the choice of their implementation.

Every function takes `impl`: "auto" picks the fastest implementation that this device
and dtype have, a named one is used or refused in words, never replaced in silence.
At present the torch versions of `reference.py` are the only ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from . import reference

Impl = Literal["auto", "torch"]
IMPLEMENTATIONS: tuple[str, ...] = ("torch",)


def _choose(name: str, impl: str) -> Callable[..., Any]:
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"impl={impl!r} for {name}: this build has {', '.join(IMPLEMENTATIONS)}; use 'auto'")
    return getattr(reference, name)


def split_fp32(w, *, impl: Impl = "auto"):
    """See `reference.split_fp32`."""
    return _choose("split_fp32", impl)(w)


def merge_fp32(high, low, *, impl: Impl = "auto"):
    """See `reference.merge_fp32`."""
    return _choose("merge_fp32", impl)(high, low)


def low_rank_forward(x, A, *, impl: Impl = "auto"):
    """See `reference.low_rank_forward`."""
    return _choose("low_rank_forward", impl)(x, A)


def low_rank_backward(dy, x, p, B, *, impl: Impl = "auto"):
    """See `reference.low_rank_backward`."""
    return _choose("low_rank_backward", impl)(dy, x, p, B)


def slice_adam_(exp_avg, exp_avg_sq, grad, *, impl: Impl = "auto", **hyper):
    """See `reference.slice_adam_`."""
    return _choose("slice_adam_", impl)(exp_avg, exp_avg_sq, grad, **hyper)


def delta_rows(dA, dB, A, B, *, second_order: bool, impl: Impl = "auto"):
    """See `reference.delta_rows`."""
    return _choose("delta_rows", impl)(dA, dB, A, B, second_order=second_order)
