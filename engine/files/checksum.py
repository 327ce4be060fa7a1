"""An order-independent 64-bit checksum of a tensor's bits.

The check of what ranks hold in memory (`integrity`) and checkpoints use the same number. A tensor's checksum is

    Σ  word[j] · f[j mod BLOCK] · g[j div BLOCK]   mod 2⁶⁴      j: position of the word in the whole tensor

with words of at most 32 bits (an element of 8 bytes is two words) and odd pseudo-random f and g. Being a sum, it
is additive over flat ranges: however a tensor is cut over ranks or files, the parts' checksums, each given where
its part starts, add up to the whole's. Nothing is rounded, so device and order of summation do not matter.

What it catches: a flipped bit always (2ᵏ times an odd number is not 0 modulo 2⁶⁴), likewise any change of a single
word. Elements that are swapped or moved, and several changes together, go unnoticed with a chance of 2⁻³² at the
worst (only sign bits differ) and 2⁻⁶⁴ mostly. It protects against accidents, not against forgery.

It does not cover dtype, shape or length (zeros add nothing); compare those separately.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 1 << 20  # words at a time: 8 MiB for the multipliers, which stay, and 8 MiB for the widened words
MASK = (1 << 64) - 1
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # by bytes of an element


@torch.no_grad()
def checksum(tensor: Tensor, start: int = 0) -> int:
    """The checksum of a tensor's bits, 0 ≤ result < 2⁶⁴.

    Args:
        tensor: of any dtype of 1, 2, 4 or 8 bytes, on any device, contiguous or not; is read in its logical order.
        start: position of its first element in the flat tensor that it is a part of.

    Example: for x of 10 elements, `add(checksum(x[:4]), checksum(x[4:], start=4)) == checksum(x)`.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part, at in _contiguous_parts(tensor.detach(), start):
        total += _sum_words(part, at)
    return total.item() & MASK  # type: ignore[operator]


def forget() -> None:
    """Frees the multipliers, 8 MiB per device; they are made anew when they are needed."""
    _multipliers.cache_clear()


def add(*sums: int) -> int:
    """The checksum of several parts together."""
    return sum(sums) & MASK


def signed(value: int) -> int:
    """The same 64 bits as the number that an int64 tensor holds; `& MASK` goes back."""
    return value - (1 << 64) if value >> 63 else value


def _contiguous_parts(tensor: Tensor, start: int) -> Iterator[tuple[Tensor, int]]:
    """(flat tensor, position of its first element); copies what is strided, a block at a time."""
    if tensor.is_contiguous():
        yield tensor.view(-1), start
        return
    width = tensor[0].numel()
    if width > BLOCK:
        for index, row in enumerate(tensor):
            yield from _contiguous_parts(row, start + index * width)
        return
    rows = max(1, BLOCK // max(1, width))
    for index in range(0, len(tensor), rows):
        yield tensor[index : index + rows].reshape(-1), start + index * width


def _sum_words(flat: Tensor, start: int) -> Tensor:
    """Of a flat contiguous tensor; wraps around as int64 does."""
    size = flat.element_size()
    per_element = 2 if size == 8 else 1
    words, at = flat.view(WORDS[size]), start * per_element
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    done = 0
    while done < words.numel():
        block, offset = divmod(at + done, BLOCK)
        count = min(BLOCK - offset, words.numel() - done)
        widened = words[done : done + count].to(torch.int64)
        total += widened.mul_(_multipliers(flat.device)[offset : offset + count]).sum() * signed(_mix(~block & MASK))
        done += count
    return total


@lru_cache(maxsize=4)
def _multipliers(device: torch.device) -> Tensor:
    """f: BLOCK odd numbers, on the device; splitmix64 of 0, 1, 2, …"""
    z = torch.arange(1, BLOCK + 1, dtype=torch.int64).mul_(signed(0x9E3779B97F4A7C15))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= (z >> shift) & ((1 << (64 - shift)) - 1)  # int64's own shift would fill with the sign
        z *= signed(factor)
    z ^= (z >> 31) & ((1 << 33) - 1)
    return z.bitwise_or_(1).to(device)


def _mix(number: int) -> int:
    """g: an odd number for a block; splitmix64 too."""
    z = (number + 1) * 0x9E3779B97F4A7C15 & MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ z >> shift) * factor & MASK
    return (z ^ z >> 31) | 1
