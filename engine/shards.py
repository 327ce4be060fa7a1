"""The fp32-precise shard of one target weight, beside the copy that ZeRO-3 gathers from.

Three ways to hold it, one interface (`read`, `write`, `nbytes`):

* `SplitShard`   bf16 compute: ZeRO-3's bf16 shard is the upper half, a 16-bit remainder the lower one.
                 4 bytes per parameter in all, lossless.
* `Fp32Shard`    bf16 compute: a separate fp32 master, 6 bytes per parameter; the oracle of the first.
* `DirectShard`  fp32 compute: ZeRO-3's own shard is the fp32 value.

`compute` is a function and not a tensor because ZeRO-3 owns that storage: it is looked up at
every use. Padding never enters: all ranges are within the elements a rank really owns. Nothing here
knows of ranks, files or updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..kernels import api as kernels


class Shard(Protocol):
    """A rank's flat range of W, exact in fp32."""

    def read(self, start: int, stop: int) -> Tensor:
        """fp32 values of elements [start, stop) of the shard; may alias the storage."""

    def write(self, start: int, stop: int, w: Tensor) -> None:
        """Stores fp32 values, and their rounding for compute, at [start, stop)."""

    @property
    def nbytes(self) -> int:
        """Bytes held beside ZeRO-3's own shard."""


class SplitShard:
    """bf16 half (ZeRO-3's shard) plus 16-bit remainder; see `kernels.reference.split_fp32`."""

    def __init__(self, compute: Callable[[], Tensor], exact: Tensor, device: torch.device) -> None:
        self._compute = compute
        high, low = kernels.split_fp32(exact)
        self.low = _place(low, device)
        compute().copy_(high)

    def read(self, start: int, stop: int) -> Tensor:
        high = self._compute()[start:stop]
        return kernels.merge_fp32(high, self.low[start:stop].to(high.device))

    def write(self, start: int, stop: int, w: Tensor) -> None:
        high, low = kernels.split_fp32(w)
        self._compute()[start:stop].copy_(high)
        self.low[start:stop].copy_(low)

    @property
    def nbytes(self) -> int:
        return self.low.nbytes


class Fp32Shard:
    """A separate fp32 master; ZeRO-3's shard is its rounding, ties up as in `SplitShard`, so that both agree."""

    def __init__(self, compute: Callable[[], Tensor], exact: Tensor, device: torch.device) -> None:
        self._compute = compute
        self.master = _place(exact.clone(), device)
        compute().copy_(kernels.split_fp32(exact)[0])

    def read(self, start: int, stop: int) -> Tensor:
        return self.master[start:stop]

    def write(self, start: int, stop: int, w: Tensor) -> None:
        self.master[start:stop].copy_(w)
        self._compute()[start:stop].copy_(kernels.split_fp32(w)[0])

    @property
    def nbytes(self) -> int:
        return self.master.nbytes


class DirectShard:
    """fp32 compute: ZeRO-3's shard is the master."""

    def __init__(self, compute: Callable[[], Tensor], exact: Tensor) -> None:
        self._compute = compute
        compute().copy_(exact)

    def read(self, start: int, stop: int) -> Tensor:
        return self._compute()[start:stop]

    def write(self, start: int, stop: int, w: Tensor) -> None:
        self._compute()[start:stop].copy_(w)

    @property
    def nbytes(self) -> int:
        return 0


FORMATS: dict[str, type[SplitShard] | type[Fp32Shard]] = {"split": SplitShard, "fp32": Fp32Shard}


def make_shard(compute: Callable[[], Tensor], exact: Tensor, *, format: str, device: str) -> Shard:
    """Puts one shard into service.

    Args:
        compute: returns ZeRO-3's shard of the weight, padding cut off (N elements, bf16 or fp32).
        exact: the N fp32 values to start from.
        format: "split" or "fp32"; both are `DirectShard` when compute is fp32.
        device: "auto" (where ZeRO-3's shard is) or "cpu", for what is held beside it.
    """
    current = compute()
    exact = exact.to(current.device)
    if current.dtype == torch.float32:
        return DirectShard(compute, exact)
    place = current.device if device == "auto" else torch.device(device)
    return FORMATS[format](compute, exact, place)


def _place(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor; host copies that serve a GPU are pinned, so that chunks travel at full speed."""
    moved = tensor.to(device)
    if device.type == "cpu" and torch.cuda.is_available():
        moved = moved.pin_memory()
    return moved
