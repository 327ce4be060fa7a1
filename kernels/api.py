"""Public kernel functions and the choice of their implementation.

Every function takes `impl`:

    "auto"     Triton for tensors on a GPU, torch elsewhere and for float64;
    "torch"    `reference.py`;
    "triton"   `kernels/<name>.py`, or a ValueError that says what is missing. On the CPU it runs
               only under TRITON_INTERPRET=1, which is how its numbers are tested without a GPU.

A named implementation is used, or refused with the reason; it is never replaced silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from torch import Tensor

from . import reference
from .available import obstacle, uses_triton

Impl = str  # one of the three, checked at every call
IMPLEMENTATIONS: tuple[str, ...] = ("triton", "torch")


def _choose(name: str, impl: str, tensor: Tensor) -> Callable[..., Any]:
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"impl={impl!r} for {name}: must be one of auto, {', '.join(IMPLEMENTATIONS)}")
    if not uses_triton(tensor, impl):
        return getattr(reference, name)
    problem = obstacle(tensor)
    if problem:
        raise ValueError(f"impl='triton' for {name}: {problem}; or use impl='torch' or 'auto'")
    return getattr(import_module(f".{name.rstrip('_')}", __package__), name)


def split_fp32(w: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.split_fp32`; elementwise integer arithmetic, torch only."""
    return reference.split_fp32(w)


def merge_fp32(high: Tensor, low: Tensor) -> Tensor:
    """See `reference.merge_fp32`; elementwise integer arithmetic, torch only."""
    return reference.merge_fp32(high, low)


def low_rank_forward(x: Tensor, A: Tensor, *, impl: Impl = "auto") -> Tensor:
    """See `reference.low_rank_forward`."""
    return _choose("low_rank_forward", impl, x)(x, A)


def low_rank_grad_B_(
    grad_B: Tensor, dy: Tensor, p: Tensor, B: Tensor, q: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor:
    """See `reference.low_rank_grad_B_`."""
    return _choose("low_rank_grad_B_", impl, dy)(grad_B, dy, p, B, q)


def low_rank_grad_A_(grad_As: Sequence[Tensor], qs: Sequence[Tensor], x: Tensor, *, impl: Impl = "auto") -> None:
    """See `reference.low_rank_grad_A_`."""
    _choose("low_rank_grad_A_", impl, x)(grad_As, qs, x)


def fused_linear(
    x: Tensor, W: Tensor, A: Tensor, bias: Tensor | None = None, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """See `reference.fused_linear`."""
    return _choose("fused_linear", impl, x)(x, W, A, bias)


def slice_adam_(exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *, impl: Impl = "auto", **hyper: Any) -> Tensor:
    """See `reference.slice_adam_`."""
    return _choose("slice_adam_", impl, grad)(exp_avg, exp_avg_sq, grad, **hyper)


def dense_delta(dA: Tensor, dB: Tensor, A: Tensor, B: Tensor, *, impl: Impl = "auto", **where: Any) -> Tensor:
    """See `reference.dense_delta`."""
    return _choose("dense_delta", impl, A)(dA, dB, A, B, **where)


def delta_apply_(
    parts: tuple[Tensor, ...],
    dA: Tensor,
    dB: Tensor,
    A: Tensor,
    B: Tensor,
    bad: Tensor,
    *,
    impl: Impl = "auto",
    **how: Any,
) -> None:
    """See `reference.delta_apply_`."""
    _choose("delta_apply_", impl, parts[0])(parts, dA, dB, A, B, bad, **how)


def shard_subtract_(parts: tuple[Tensor, ...], D: Tensor, bad: Tensor, *, scale: float, impl: Impl = "auto") -> None:
    """See `reference.shard_subtract_`."""
    _choose("shard_subtract_", impl, parts[0])(parts, D, bad, scale=scale)
