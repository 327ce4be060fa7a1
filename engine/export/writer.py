"""Writes safetensors files that no process could hold: ranks send pieces, rank 0 appends them to the file.

Shapes are known beforehand, so rank 0 writes a safetensors header and then the pieces, at most `PIECE_BYTES` each, as
they arrive: ZeRO-3's flat shards in rank order are the row-major tensor. A finished file is read back from the disk
and must have the SHA-256 of what was sent.

Files are written into a hidden folder inside the target folder and move to their places only when all of them are
complete. The files of an earlier export are moved aside first, beginning with the one that a loader opens first (index
or config); the new one comes last. A failure is undone. A crash leaves a folder that does not load, never a mix of two
exports; the earlier files are then in `.export.replaced`.

One process without a process group can use it, too (`World()`), so nothing here imports DeepSpeed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .. import consensus
from ..distributed import heartbeat
from ..distributed.faults import fault
from ..errors import ConfigError, one_line
from ..files import disk
from ..files.tensor_file import header
from ..sharding.base_files import open_tensors
from .report import ExportReport

PIECE_BYTES = 16 * 2**20  # in fp32; rank 0 holds a piece, what it is made from, and what gloo or NCCL needs for it
PARTIAL, REPLACED = ".export.partial", ".export.replaced"
REPORT = "hdpissa_export.json"
# The files of an earlier export of either format, those that loaders open first at the beginning.
STALE = ["model.safetensors.index.json", "adapter_config.json", "model.safetensors", "adapter_model.safetensors"]
STALE += ["adapter_model.bin", "model-?????-of-?????.safetensors"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def resolve_dtype(name: str, auto: torch.dtype) -> torch.dtype:
    """The dtype of an export. Raises ConfigError unless `name` is "auto", "bf16" or "fp32"."""
    if name not in ("auto", *DTYPES):
        raise ConfigError(f"export dtype is {name!r}: must be 'auto', 'bf16' or 'fp32'")
    return DTYPES.get(name, auto)


def foreign_weights(folder: Path) -> Path | None:
    """A file of weights in a folder that no export has written; an export there would destroy somebody's model."""
    if (folder / REPORT).exists() or (folder / PARTIAL).exists():
        return None
    return next((p for end in ("safetensors", "bin") for p in sorted(folder.glob(f"*model*.{end}"))), None)


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


@dataclass(frozen=True)
class World:
    """The ranks that export together; by default one process alone."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Block:
    """Consecutive elements of a tensor, spread over the ranks.

    Attributes:
        sizes: elements on each rank.
        part: this rank's elements [begin, end), flat, in the tensor's dtype.
        rows: None where the ranks' parts follow one another. Otherwise the parts are matrices of so many rows, side by
            side, and rank 0 holds the whole block at once.
    """

    sizes: Sequence[int]
    part: Callable[[int, int], Tensor]
    rows: int | None = None


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. `blocks` yields its blocks in order, the same on all ranks; it may communicate."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterator[Block]]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def on_rank0(numel: int, part: Callable[[int, int], Tensor], world: World) -> Iterator[Block]:
    """The one block of a tensor that rank 0 has to itself."""
    yield Block([numel] + [0] * (world.size - 1), part)


def _pieces(entry: Entry, world: World) -> Iterator[Tensor]:
    """The elements of a tensor in order, flat, on rank 0; the other ranks send and get nothing. Collective."""
    heartbeat.beat("export")
    for block in entry.blocks():
        heartbeat.progress()
        if block.rows is None:
            yield from _send(block, entry.dtype, world, max(1, PIECE_BYTES // 4))
        else:
            parts = [p.view(block.rows, -1) for p in _send(block, entry.dtype, world, max(block.sizes))]
            if parts:
                yield torch.cat(parts, 1).flatten()


def _send(block: Block, dtype: torch.dtype, world: World, step: int) -> Iterator[Tensor]:
    for rank, size in enumerate(block.sizes):
        for begin in range(0, size, step):
            end = min(begin + step, size)
            if rank == world.rank:
                mine = block.part(begin, end).contiguous()
                if rank == 0:
                    yield mine
                else:
                    dist.send(mine.view(torch.uint8).to(world.device), 0)
            elif world.rank == 0:
                received = torch.empty((end - begin) * dtype.itemsize, dtype=torch.uint8, device=world.device)
                dist.recv(received, rank)
                yield received.view(dtype)


class ExportWriter:
    """Writes one export into one folder. All ranks make one and call its methods together; rank 0 alone uses the disk.

    After a failure rank 0 keeps receiving and writes nothing, so that no rank waits for it; `agree` raises on all.

    Attributes:
        partial: the hidden folder that holds the files until `publish`.

    Raises:
        ConfigError: on all ranks, from the constructor, `agree` and `publish`: the export failed.
    """

    def __init__(self, folder: Path, world: World, *, nbytes: int) -> None:
        self.folder, self.partial, self.world = folder, folder / PARTIAL, world
        self._records: dict[str, disk.FileRecord] = {}
        self._problem: str | None = None
        self._is_new = not folder.exists()
        self.on_rank0(lambda: self._prepare(nbytes))
        self.agree()

    def on_rank0(self, action: Callable[[], object]) -> None:
        """Calls `action` on rank 0, unless something has failed before; its exception fails the export."""
        if self.world.rank == 0 and self._problem is None:
            try:
                action()
            except Exception as error:  # the other ranks wait, whatever it is
                self.fail(error)

    def fail(self, error: Exception) -> None:
        """Has the next `agree` raise this error on all ranks."""
        text = f"export to {self.folder} failed: {one_line(error)}; solve that, or give another folder"
        self._problem = self._problem or (str(error) if isinstance(error, ConfigError) else text)

    def _prepare(self, nbytes: int) -> None:
        if foreign := foreign_weights(self.folder):
            raise ConfigError(f"{self.folder} holds a model that no export wrote ({foreign.name}); give another folder")
        disk.make_folder(self.folder)
        shutil.rmtree(self.partial, ignore_errors=True)  # of an export that was killed
        free = disk.free_bytes(self.folder)
        if nbytes > free:
            raise ConfigError(
                f"export to {self.folder} failed: it needs {nbytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
                f"make room, or give another folder"
            )
        disk.make_folder(self.partial)

    def write(self, name: str, entries: Sequence[Entry]) -> None:
        """Streams a safetensors file to the disk and verifies it."""
        head = header((e.name, e.dtype, e.shape) for e in entries)  # an unknown dtype is refused on all ranks
        stream = self._stream(head, entries)
        self.on_rank0(lambda: self._write(name, stream))
        for _ in stream:  # what rank 0 has left of it after a failure; on the other ranks all of it
            pass

    def _stream(self, head: bytes, entries: Sequence[Entry]) -> Iterator[memoryview]:
        yield memoryview(head)
        for entry in entries:
            for piece in _pieces(entry, self.world):
                yield memoryview(piece.view(torch.uint8).cpu().numpy())  # type: ignore[arg-type]

    def _write(self, name: str, stream: Iterator[memoryview]) -> None:
        path = self.partial / name
        record = disk.write_file(path, stream)
        fault("export.written")
        _drop_cache(path)
        if disk.read_record(path) != record:
            raise ConfigError(
                f"export to {self.folder} failed: {name} read back differs from what was written; check the disk"
            )
        with open_tensors(path):  # which checks header and length
            pass
        self._records[name] = record

    def agree(self) -> None:
        """Raises ConfigError on all ranks if anything has failed on rank 0, and removes what was written."""
        problem = consensus.first(self._problem) if self.world.size > 1 else self._problem
        if problem is None:
            return
        if self.world.rank == 0:
            for folder in (self.partial, self.folder / REPLACED):
                shutil.rmtree(folder, ignore_errors=True)
            if self._is_new:
                with contextlib.suppress(OSError):  # there never was a folder, or it is not empty
                    self.folder.rmdir()
        raise ConfigError(problem)

    def publish(self, report: ExportReport, entry_point: str) -> None:
        """Adds the report and moves every file in `partial` to its place, those of an earlier export out of it.

        Args:
            entry_point: the file that a loader opens first.
        """
        self.on_rank0(lambda: self._write_report(report))
        self.on_rank0(lambda: self._publish(entry_point))
        self.agree()

    def _write_report(self, report: ExportReport) -> None:
        content = report.as_dict() | {"files": {name: asdict(record) for name, record in self._records.items()}}
        disk.write_file(self.partial / REPORT, [(json.dumps(content, indent=2, allow_nan=False) + "\n").encode()])

    def _publish(self, entry_point: str) -> None:
        for path in self.partial.iterdir():
            with path.open("rb") as file:  # transformers does not fsync what it writes
                os.fsync(file.fileno())
        new = sorted((p.name for p in self.partial.iterdir()), key=lambda name: (name == entry_point, name))
        old = [path.name for pattern in STALE for path in sorted(self.folder.glob(pattern))]
        old += [name for name in new if (self.folder / name).exists() and name not in old]
        replaced = self.folder / REPLACED
        shutil.rmtree(replaced, ignore_errors=True)
        disk.make_folder(replaced)
        moves = [(self.folder / name, replaced / name) for name in old]
        moves += [(self.partial / name, self.folder / name) for name in new]
        with contextlib.ExitStack() as undo:
            for source, target in moves:
                undo.callback(_move_back, target, source)
                disk.rename(source, target, "export.publish")
            undo.pop_all()
        shutil.rmtree(replaced, ignore_errors=True)
        self.partial.rmdir()


def _move_back(target: Path, source: Path) -> None:
    if target.exists() and not source.exists():
        os.rename(target, source)


def _drop_cache(path: Path) -> None:
    """Asks the system to drop its copy of a file, so that it is read from the disk next."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
