"""The fp32-precise shard of one target weight, beside the copy that ZeRO-3 gathers from.

Three ways to hold it, one interface (`read`, `parts`, `nbytes`):

* `SplitShard`   bf16 compute: ZeRO-3's bf16 shard is the upper half, a 16-bit remainder the lower one.
                 4 bytes per parameter in all, lossless.
* `Fp32Shard`    bf16 compute: a separate fp32 master, 6 bytes per parameter; the oracle of the first.
* `DirectShard`  fp32 compute: ZeRO-3's own shard is the fp32 value.

`parts` are the tensors that the kernels change in place (`kernels.reference.delta_apply_`). They may lie on the
host while the factors are on a GPU; `on_device` then stages them through the GPU in bounded chunks.

`compute` is a function and not a tensor because ZeRO-3 owns that storage: it is looked up at
every use. Padding never enters: all ranges are within the elements a rank really owns. Nothing here
knows of ranks, files or updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from hdpissa.kernels import api as kernels

# Elements of a host shard that are on the GPU at a time: 64 MiB of a split shard.
STAGED_ELEMENTS = 16 * 2**20


class Shard(Protocol):
    """A rank's flat range of W, exact in fp32."""

    def read(self, start: int, stop: int) -> Tensor:
        """fp32 values of elements [start, stop) of the shard; may alias the storage."""

    def write(self, exact: Tensor) -> None:
        """Replaces all values by N fp32 ones."""

    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that hold it, as `kernels.delta_apply_` takes them; for use at once, not to be kept."""

    @property
    def nbytes(self) -> int:
        """Bytes held beside ZeRO-3's own shard."""


class SplitShard:
    """bf16 half (ZeRO-3's shard) plus 16-bit remainder; see `kernels.reference.split_fp32`."""

    def __init__(self, compute: Callable[[], Tensor], exact: Tensor, place: Callable[[Tensor], Tensor]) -> None:
        self._compute = compute
        high, low = kernels.split_fp32(exact)
        self.low = place(low)
        compute().copy_(high)

    def read(self, start: int, stop: int) -> Tensor:
        high = self._compute()[start:stop]
        return kernels.merge_fp32(high, self.low[start:stop].to(high.device))

    def write(self, exact: Tensor) -> None:
        high, low = kernels.split_fp32(exact.to(self._compute().device))
        self.low.copy_(low)
        self._compute().copy_(high)

    def parts(self) -> tuple[Tensor, ...]:
        return self._compute(), self.low

    @property
    def nbytes(self) -> int:
        return self.low.nbytes


class Fp32Shard:
    """A separate fp32 master; ZeRO-3's shard is its rounding, ties up as in `SplitShard`, so that both agree."""

    def __init__(self, compute: Callable[[], Tensor], exact: Tensor, place: Callable[[Tensor], Tensor]) -> None:
        self._compute = compute
        self.master = place(exact.clone())
        compute().copy_(kernels.split_fp32(exact)[0])

    def read(self, start: int, stop: int) -> Tensor:
        return self.master[start:stop]

    def write(self, exact: Tensor) -> None:
        self.master.copy_(exact)
        self._compute().copy_(kernels.split_fp32(exact)[0])

    def parts(self) -> tuple[Tensor, ...]:
        return self.master, self._compute()

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

    def write(self, exact: Tensor) -> None:
        self._compute().copy_(exact)

    def parts(self) -> tuple[Tensor, ...]:
        return (self._compute(),)

    @property
    def nbytes(self) -> int:
        return 0


FORMATS: dict[str, type[SplitShard] | type[Fp32Shard]] = {"split": SplitShard, "fp32": Fp32Shard}


class HostMemory:
    """Room for the shards that are held on the host, of which each is a view; all of one dtype.

    Few blocks in place of one per shard: torch rounds each pinned allocation up to a power of two bytes. So the blocks
    are powers of two themselves, the largest first that what is still to come fills.

    Args:
        numel: elements that will be taken in all.
        pin: so that chunks travel to a GPU and back at full speed, beside the host.
    """

    def __init__(self, numel: int, *, pin: bool) -> None:
        self._to_come, self._pin = numel, pin
        self._free = torch.empty(0)

    def take(self, values: Tensor) -> Tensor:
        """A copy of flat values."""
        numel = values.numel()
        if numel > self._free.numel():
            size = max(numel, 1 << max(self._to_come, 1).bit_length() - 1)
            self._free = torch.empty(size, dtype=values.dtype, pin_memory=self._pin)
        self._to_come -= numel
        taken, self._free = self._free[:numel], self._free[numel:]
        return taken.copy_(values)


def make_shard(
    compute: Callable[[], Tensor], exact: Tensor, *, format: str, device: str, host: HostMemory | None = None
) -> Shard:
    """Puts one shard into service.

    Args:
        compute: returns ZeRO-3's shard of the weight, padding cut off (N elements, bf16 or fp32).
        exact: the N fp32 values to start from.
        format: "split" or "fp32"; both are `DirectShard` when compute is fp32.
        device: "auto" (where ZeRO-3's shard is) or "cpu", for what is held beside it.
        host: where that is taken from when it is on the host; None: each shard has memory of its own.
    """
    current = compute()
    exact = exact.to(current.device)
    if current.dtype == torch.float32:
        return DirectShard(compute, exact)
    home = current.device if device == "auto" else torch.device(device)
    place = host.take if host is not None and home.type == "cpu" else lambda tensor: tensor.to(home)
    return FORMATS[format](compute, exact, place)


# --- host shards, device factors ------------------------------------------------------------------


def on_device(
    parts: tuple[Tensor, ...], device: torch.device, *, chunk: int = STAGED_ELEMENTS
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yields (offset, parts on `device`) for the caller to change in place.

    Once, and the parts themselves, where all of them are there already. Otherwise chunk by chunk: a part that is
    elsewhere is copied to the device, and back when the caller asks for the next chunk. 4 bytes per parameter go
    up and 4 come down for a split shard; nothing is computed on the host. The copies run on the current stream and
    are complete after the step's fence.
    """
    away = [is_elsewhere(part, device) for part in parts]
    if not any(away):
        yield 0, parts
        return
    numel = parts[0].numel()
    size = min(chunk, numel)
    room = [torch.empty(size, dtype=p.dtype, device=device) if a else p for p, a in zip(parts, away, strict=True)]
    for start in range(0, numel, max(size, 1)):
        stop = min(start + size, numel)
        home = [p[start:stop] for p in parts]
        here = [r[: stop - start] if a else h for r, h, a in zip(room, home, away, strict=True)]
        copied = [(h, d) for h, d, a in zip(home, here, away, strict=True) if a]
        for host, staged in copied:
            staged.copy_(host, non_blocking=True)
        yield start, tuple(here)
        for host, staged in copied:
            host.copy_(staged, non_blocking=True)


def staging_bytes(parts: tuple[Tensor, ...], device: torch.device, *, chunk: int = STAGED_ELEMENTS) -> int:
    """Device bytes that `on_device` allocates."""
    return sum(min(chunk, p.numel()) * p.element_size() for p in parts if is_elsewhere(p, device))


def is_elsewhere(part: Tensor, device: torch.device) -> bool:
    """Whether a part has to be staged."""
    return part.device != device
