"""Whether Triton's kernels can run on a tensor here, and why not."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

# Widest slice that `fused_linear` takes: wider ones leave no registers for the large product.
FUSED_MAX_R = 64


@functools.cache
def has_triton() -> bool:
    """Whether the package is installed; it is not imported for that."""
    return importlib.util.find_spec("triton") is not None


def obstacle(tensor: Tensor) -> str | None:
    """Why Triton cannot take this tensor, with the remedy; None when it can."""
    if not has_triton():
        return "triton is not installed; pip install triton"
    if tensor.dtype == torch.float64:
        return "float64 is for the torch version only"
    if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {tensor.device.type}, Triton needs a GPU (or TRITON_INTERPRET=1, to test numbers)"
    return None


def uses_triton(tensor: Tensor, impl: str) -> bool:
    """Whether `impl` means Triton for this tensor."""
    return impl == "triton" or (impl == "auto" and tensor.device.type == "cuda" and obstacle(tensor) is None)
