"""Matrix products in full fp32, whatever the process allows elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Float32 products in float32, whatever the process allows elsewhere: TF32 and bf16 end at residuals of 1e-3.

    torch keeps the older setting (`set_float32_matmul_precision`, `allow_tf32`) beside the newer `fp32_precision` of
    each backend, and raises where somebody reads the older one while the two disagree; so both are set, and restored.
    """
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # no stub has the second
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"  # beside which the older setting can be read, whatever it is
    older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = "none"  # inherits; made explicit only where that is not what it was
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision
