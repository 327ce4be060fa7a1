"""What several Triton kernels share: blocks for a size, checks of arguments, and the record of what is compiled ahead.

Imported only by kernel modules, so that a machine without Triton never gets here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

# Triton's names of the dtypes that kernels take as pointers; torch's allocations are aligned.
POINTER = {
    torch.float32: "*fp32:16",
    torch.float16: "*fp16:16",
    torch.bfloat16: "*bf16:16",
    torch.int32: "*i32:16",
    torch.int16: "*i16:16",
}


@dataclass(frozen=True)
class AotCase:
    """One configuration that the launcher really uses, for compiling it without a GPU.

    Attributes:
        name: what the table calls it, e.g. "low_rank_forward bf16 r16".
        kernel: the jit function.
        signature: argument name → Triton type ("*bf16", "i32", "fp32", …); ":16" behind it says that the value
            is divisible by 16, as pointers and sizes of real layers are: the compiler then loads 16 bytes at a time.
        constexprs: values of the constexpr arguments, and 1 for strides that are 1.
        num_warps, num_stages: as launched.
        tensor_core: whether matrix instructions must be in the machine code.
        options: further compile options, as launched.
        targets: the chips that the launcher uses this configuration on.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    tensor_core: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("sm_80", "sm_90", "gfx942")

    def source(self) -> Any:
        """What `triton.compile` takes."""
        names = self.kernel.arg_names
        types = {name: self.signature.get(name, "constexpr").removesuffix(":16") for name in names}
        aligned = [name for name in names if self.signature.get(name, "").endswith(":16")]
        attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        return ASTSource(fn=self.kernel, signature=types, constexprs=dict(self.constexprs), attrs=attrs)


INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b in fp32. Triton 3.6's interpreter multiplies bf16 by its bit patterns: there both are widened."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 x in `dtype`, rounded to nearest even; the interpreter's own cast to bf16 cuts off."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x == x, rounded, bits >> 16)  # a NaN must not carry over into another number
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


# Not specialised: a size of 1 would become a Python constant, and the kernel be compiled once more for it.
@triton.jit(do_not_specialize=["numel", "stride", "count"])
def sum_partials(partial, out, numel, stride, count, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """out (+)= Σ_s partial[s · stride + …], in the order of s: the second pass that stands in for atomics."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for s in range(count):
        total += tl.load(partial + s * stride.to(tl.int64) + at, mask=inside, other=0.0)
    if ADD:
        total += tl.load(out + at, mask=inside, other=0.0)
    tl.store(out + at, narrow(total, out.dtype.element_ty), mask=inside)


SUM_BLOCK = 1024

# `input_precision` of tl.dot for fp32 operands: three bf16 parts each, six products. Accurate to fp32 on matrix
# units of every target, where "tf32x3" (the same cost on NVIDIA) is NVIDIA's alone and "ieee" leaves them idle.
# The interpreter multiplies in fp32 in any case, and does not know the name.
FP32_DOT = "ieee" if triton.knobs.runtime.interpret else "bf16x6"


def sum_partials_(partial: Tensor, out: Tensor, *, add: bool) -> None:
    """`sum_partials` over (count, *out.shape) fp32 partial sums, dense but for the first stride; out dense."""
    numel = out.numel()
    sum_partials[(triton.cdiv(numel, SUM_BLOCK),)](
        partial, out, numel, partial.stride(0), partial.shape[0], ADD=add, BLOCK=SUM_BLOCK
    )


def multiprocessors(device: torch.device) -> int:
    """What there is to fill; the interpreter gets a few, so that work is split there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def block(size: int, least: int = 16, most: int = 256) -> int:
    """The power of two that covers `size`, within [least, most]; tl.dot wants 16 at least."""
    return max(least, min(most, triton.next_power_of_2(size)))


def require(condition: bool, message: str) -> None:
    """Raises ValueError; launchers use it because a wrong pointer on a GPU has no message at all."""
    if not condition:
        raise ValueError(message)


def require_dtype(name: str, **tensors: Tensor | None) -> None:
    """The named tensors must be bf16 or fp32, the first one's dtype all of them."""
    given = {argument: tensor.dtype for argument, tensor in tensors.items() if tensor is not None}
    first = next(iter(given.values()))
    for argument, dtype in given.items():
        valid = dtype == first and dtype in (torch.bfloat16, torch.float32)
        require(valid, f"{name}: {argument} is {dtype}; must be bfloat16 or float32, all alike")


def require_same_device(name: str, *tensors: Tensor | None) -> None:
    """All tensors on one device."""
    devices = {t.device for t in tensors if t is not None}
    require(len(devices) <= 1, f"{name}: tensors are on {sorted(map(str, devices))}; move them to one device")


def require_contiguous(name: str, **tensors: Tensor | None) -> None:
    """The named tensors must be contiguous."""
    for argument, tensor in tensors.items():
        require(tensor is None or tensor.is_contiguous(), f"{name}: {argument} must be contiguous")
