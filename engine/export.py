"""The trained model as a Hugging Face folder, streamed: no process ever holds more than a shard of a tensor.

The shapes are known, so rank 0 writes each safetensors header first and then appends what the ranks
send it, tensor by tensor, in rank order: ZeRO-3's flat shards, one after another, are the row-major
tensor. Files have temporary names until all of them are complete.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import pulse, zero3
from .errors import ConfigError
from .slicing import SlicePlan
from .targets import Target
from .tensor_file import header

MAX_FILE_BYTES = 5 * 10**9  # as transformers' save_pretrained

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Entry:
    """One tensor of the export.

    Attributes:
        part: returns this rank's elements, flat, in the export dtype.
        sizes: elements of each rank's part.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: Callable[[], Tensor]
    sizes: list[int]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes) * self.dtype.itemsize


def export_hf(model: nn.Module, targets: Sequence[Target], plan: SlicePlan, folder: Path, *, dtype: str) -> None:
    """Writes safetensors, index, config.json and generation_config.json; collective.

    Args:
        dtype: "bf16", "fp32" or "auto" (the compute dtype). Under bf16 compute "fp32" gives the exact
            master of every target; what is not a target has only its bf16 value.

    Raises:
        ConfigError: unknown dtype; or, on all ranks, rank 0 cannot write there.
    """
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"export dtype is {dtype!r}: must be 'auto', 'bf16' or 'fp32'")
    compute = zero3.shard_view(targets[0].param).dtype
    out = compute if dtype == "auto" else DTYPES[dtype]
    files = _plan_files(list(_entries(model, targets, plan, out)))
    headers = [
        header((e.name, e.dtype, e.shape) for e in entries) for entries in files
    ]  # on every rank, so that all refuse an odd dtype alike
    writer = _Writer(folder, files, headers) if plan.rank == 0 else None
    for index, entries in enumerate(files):
        for entry in entries:
            _collect(entry, plan, writer, index)
    if writer:
        writer.finish(model, out)
    _raise_together(writer)


def _entries(model: nn.Module, targets: Sequence[Target], plan: SlicePlan, out: torch.dtype) -> Iterator[Entry]:
    """Every parameter once (tied ones under their first name) and every persistent buffer."""
    exact = {id(t.param): t for t in targets}
    for name, param in model.named_parameters():
        if zero3.is_anchor(name):
            continue
        shape = tuple(zero3.full_shape(param))
        numel = zero3.full_numel(param)
        size = -(-numel // plan.world_size)
        sizes = [max(0, min(size, numel - k * size)) for k in range(plan.world_size)]
        yield Entry(name, shape, out, _part(param, exact.get(id(param)), plan, out), sizes)
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved:
            part = buffer.flatten() if plan.rank == 0 else buffer.flatten()[:0]  # replicated: rank 0's is enough
            sizes = [buffer.numel()] + [0] * (plan.world_size - 1)
            yield Entry(name, tuple(buffer.shape), buffer.dtype, functools.partial(_same, part), sizes)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _part(param: nn.Parameter, target: Target | None, plan: SlicePlan, out: torch.dtype) -> Callable[[], Tensor]:
    def part() -> Tensor:
        if target is not None and target.shard is not None and out == torch.float32:
            return target.shard.read(0, target.own_range(plan).numel)
        return zero3.shard_view(param).to(out)

    return part


def _plan_files(entries: list[Entry]) -> list[list[Entry]]:
    files: list[list[Entry]] = [[]]
    used = 0
    for entry in entries:
        if files[-1] and used + entry.nbytes > MAX_FILE_BYTES:
            files.append([])
            used = 0
        files[-1].append(entry)
        used += entry.nbytes
    return files


def _collect(entry: Entry, plan: SlicePlan, writer: _Writer | None, file: int) -> None:
    """Brings one tensor's parts to rank 0, in rank order, one at a time."""
    pulse.reach("export")
    mine = entry.part().contiguous().view(torch.uint8)
    if writer is None:
        if mine.numel():
            dist.send(mine.to(zero3.device()), 0)
        return
    writer.append(file, mine)
    for rank in range(1, plan.world_size):
        if entry.sizes[rank]:
            received = torch.empty(entry.sizes[rank] * entry.dtype.itemsize, dtype=torch.uint8, device=zero3.device())
            dist.recv(received, rank)
            pulse.tick()
            writer.append(file, received)


def _raise_together(writer: _Writer | None) -> None:
    failed = torch.tensor([int(writer is not None and writer.problem is not None)], device=zero3.device())
    dist.broadcast(failed, 0)
    if failed.item():
        raise ConfigError(str(writer.problem) if writer else "export failed on rank 0; see its message")


class _Writer:
    """Rank 0's end. After a failure it goes on receiving and writes nothing, so that no rank hangs."""

    def __init__(self, folder: Path, files: list[list[Entry]], headers: list[bytes]) -> None:
        self.folder, self.files, self.headers = folder, files, headers
        self.problem: str | None = None
        self._open: dict[int, IO[bytes]] = {}
        self._guard(lambda: folder.mkdir(parents=True, exist_ok=True))

    def _guard(self, action: Callable[[], object]) -> None:
        if self.problem is not None:
            return
        try:
            action()
        except Exception as error:  # whatever it is: the other ranks wait for our word
            reason = getattr(error, "strerror", None) or " ".join(f"{type(error).__name__}: {error}".split())
            self.problem = f"export to {self.folder} failed: {reason}; mend it or give another folder, and export again"

    def name(self, index: int) -> str:
        if len(self.files) == 1:
            return "model.safetensors"
        return f"model-{index + 1:05d}-of-{len(self.files):05d}.safetensors"

    def _temporary(self, index: int) -> Path:
        return self.folder / f".{self.name(index)}.partial"

    def append(self, index: int, data: Tensor) -> None:
        def write() -> None:
            if index not in self._open:
                self._open[index] = self._temporary(index).open("wb")
                self._open[index].write(self.headers[index])
            self._open[index].write(memoryview(data.cpu().numpy()))

        self._guard(write)

    def finish(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._guard(lambda: self._publish(model, dtype))
        for file in self._open.values():
            with contextlib.suppress(OSError):  # a full disk complains about the rest of the buffer once more
                file.close()
        if self.problem is not None:
            for index in self._open:
                with contextlib.suppress(OSError):
                    self._temporary(index).unlink(missing_ok=True)

    def _publish(self, model: nn.Module, dtype: torch.dtype) -> None:
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())
        _save_configs(model, self.folder, dtype)  # may refuse; the earlier weights are still in place then
        for stale in self.folder.glob("model*.safetensors*"):
            stale.unlink()
        for index in self._open:
            self._temporary(index).rename(self.folder / self.name(index))
        if len(self.files) > 1:
            self._write_index()

    def _write_index(self) -> None:
        weight_map = {e.name: self.name(i) for i, entries in enumerate(self.files) for e in entries}
        total = sum(e.nbytes for entries in self.files for e in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _save_configs(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    config = copy.deepcopy(getattr(model, "config", None))
    if config is None:  # a plain torch module
        return
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
