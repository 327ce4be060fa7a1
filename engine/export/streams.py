"""Files of tensors that no process holds: ranks send pieces, rank 0 writes them, and all learn how it went.

Both exports are made of this. Shapes are known beforehand, so rank 0 writes a safetensors header and appends what
arrives, a piece of at most `PIECE_BYTES` at a time: ZeRO-3's flat shards, one after another, are the row-major
tensor. A finished file is read again from the disk and has to have the checksum of what was sent.

Everything is written into a hidden folder inside the one that was asked for. Only when all of it is complete and
verified do the files get their places: those of an earlier export are moved aside first, beginning with what a loader
would begin with (its index or config), and the new one's comes last. What fails is taken back. A crash in between
leaves a folder that does not load, never one that is a mix; the earlier files are then in `.export.replaced`.

Also used by one process without any process group (`World()`), so nothing here imports DeepSpeed.
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

from ..distributed import heartbeat
from ..distributed.faults import fault
from ..errors import ConfigError
from ..files import disk
from ..files.tensor_file import DTYPE_NAMES, header
from ..sharding.base_files import open_tensors
from .report import ExportReport

PIECE_BYTES = 16 * 2**20  # in fp32; rank 0 holds a piece, what it is made from, and what gloo or NCCL needs for it
PARTIAL, REPLACED = ".export.partial", ".export.replaced"
REPORT = "hdpissa_export.json"

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def dtype_name(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


@dataclass(frozen=True)
class World:
    """Who takes part; the default is one process alone."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Block:
    """A run of a tensor's elements.

    Attributes:
        sizes: elements that each rank has of it.
        part: this rank's elements [begin, end) of its own, flat, in the tensor's dtype.
        rows: None where the ranks' parts follow one another, and are sent in pieces. A number where the parts are
            matrices of so many rows that stand side by side; rank 0 then holds the whole block at once.
    """

    sizes: Sequence[int]
    part: Callable[[int, int], Tensor]
    rows: int | None = None


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. `blocks` follow one another, alike on all ranks; it may communicate between two of them."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterator[Block]]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def collect(entry: Entry, world: World) -> Iterator[Tensor]:
    """What a tensor consists of, in order, on rank 0; the others only send, and get nothing. Collective."""
    heartbeat.beat("export")
    for block in entry.blocks():
        heartbeat.progress()
        if block.rows is None:
            yield from _pieces(block, entry.dtype, world, max(1, PIECE_BYTES // 4))
        else:
            parts = [p.view(block.rows, -1) for p in _pieces(block, entry.dtype, world, max(block.sizes))]
            if parts:
                yield torch.cat(parts, 1).flatten()


def _pieces(block: Block, dtype: torch.dtype, world: World, step: int) -> Iterator[Tensor]:
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


def whole_on_one(tensor: Callable[[], Tensor], numel: int, world: World) -> Iterator[Block]:
    """The blocks of a tensor that rank 0 has by itself."""
    yield Block([numel] + [0] * (world.size - 1), lambda begin, end: tensor().flatten()[begin:end])


class Outbox:
    """One export into one folder; every rank makes one and calls its methods at the same time.

    Raises:
        ConfigError: on all ranks, from the constructor and `agree`: the folder cannot be written, or has no room.

    Only rank 0 touches the disk. After a failure it goes on receiving and writes nothing, so that no rank hangs;
    `agree` tells all of them.

    Attributes:
        partial: the hidden folder that the files are in until `publish`.
        records: of each tensor file, bytes and checksum; on rank 0.
    """

    def __init__(self, folder: Path, world: World, *, nbytes: int) -> None:
        self.folder, self.partial, self.world = folder, folder / PARTIAL, world
        self.records: dict[str, disk.FileRecord] = {}
        self._problem: str | None = None
        self._new = not folder.exists()
        self.guard(lambda: self._prepare(nbytes))
        self.agree()

    def guard(self, action: Callable[[], object]) -> None:
        """Does something on rank 0, unless there was a failure; an exception becomes the failure."""
        if self.world.rank or self._problem is not None:
            return
        try:
            action()
        except Exception as error:  # whatever it is: the other ranks wait for our word
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Makes an exception of rank 0 the failure of the export, unless there was one before it."""
        text = f"export to {self.folder} failed: {_reason(error)}; mend it or give another folder, and export again"
        self._problem = self._problem or (str(error) if isinstance(error, ConfigError) else text)

    def _prepare(self, nbytes: int) -> None:
        disk.make_folder(self.folder)
        shutil.rmtree(self.partial, ignore_errors=True)  # of an export that was killed
        free = disk.free_bytes(self.folder)
        if nbytes > free:
            raise OSError(f"it needs {nbytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")
        disk.make_folder(self.partial)

    def write(self, name: str, entries: Sequence[Entry]) -> None:
        """Streams a safetensors file and verifies it."""
        head = header((e.name, e.dtype, e.shape) for e in entries)  # on all ranks, which refuse an odd dtype alike
        stream = self._stream(head, entries)
        if self.world.rank == 0:
            self.guard(lambda: self._write(name, stream, entries))
        for _ in stream:  # what is left of it: all of it where this is not rank 0, the rest after a failure
            pass

    def _stream(self, head: bytes, entries: Sequence[Entry]) -> Iterator[memoryview]:
        yield memoryview(head)
        for entry in entries:
            for piece in collect(entry, self.world):
                data = piece.view(torch.uint8).cpu()
                yield memoryview(data.numpy())  # type: ignore[arg-type]  # numpy has the buffer protocol

    def _write(self, name: str, stream: Iterator[memoryview], entries: Sequence[Entry]) -> None:
        path = self.partial / name
        record = disk.write_file(path, stream)
        fault("export.written")
        _forget_pages(path)
        if disk.read_record(path) != record:
            raise OSError(f"{name} read back is not what was written: see to the disk")
        _check_header(path, entries)
        self.records[name] = record

    def agree(self) -> None:
        """Raises ConfigError on all ranks, with rank 0's words, when anything has failed; cleans up then."""
        text = (self._problem or "").encode()
        if self.world.size > 1:
            length = torch.tensor([len(text)], device=self.world.device)
            dist.broadcast(length, 0)
            told = torch.zeros(int(length.item()), dtype=torch.uint8, device=self.world.device)
            if self.world.rank == 0 and text:
                told.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
            if told.numel():
                dist.broadcast(told, 0)
            text = bytes(told.tolist())
        if text:
            if self.world.rank == 0:
                for folder in (self.partial, self.folder / REPLACED):
                    shutil.rmtree(folder, ignore_errors=True)
                if self._new:
                    with contextlib.suppress(OSError):  # it was not there, or is no longer empty
                        self.folder.rmdir()
            raise ConfigError(text.decode())

    def publish(self, report: ExportReport, entry_point: str, stale: Sequence[str]) -> None:
        """Adds the report, gives every file in `partial` its place, and agrees.

        Args:
            entry_point: the file that a loader begins with.
            stale: patterns of an earlier export's files, entry points first.
        """
        self.guard(lambda: self._write_report(report))
        self.guard(lambda: self._publish(entry_point, stale))
        self.agree()

    def _write_report(self, report: ExportReport) -> None:
        content = report.as_dict() | {"files": {name: asdict(record) for name, record in self.records.items()}}
        disk.write_file(self.partial / REPORT, [(json.dumps(content, indent=2, allow_nan=False) + "\n").encode()])

    def _publish(self, entry_point: str, stale: Sequence[str]) -> None:
        for path in self.partial.iterdir():
            _sync(path)  # those that transformers wrote
        disk.sync_folder(self.partial)
        new = sorted((p.name for p in self.partial.iterdir()), key=lambda name: (name == entry_point, name))
        old = [path.name for pattern in stale for path in sorted(self.folder.glob(pattern))]
        old += [name for name in new if (self.folder / name).exists() and name not in old]
        replaced = self.folder / REPLACED
        shutil.rmtree(replaced, ignore_errors=True)
        disk.make_folder(replaced)
        moves = [(self.folder / name, replaced / name) for name in old]
        _move_all([*moves, *((self.partial / name, self.folder / name) for name in new)])
        disk.sync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        self.partial.rmdir()


def _move_all(moves: Sequence[tuple[Path, Path]]) -> None:
    """Renames in this order; takes everything back where one fails."""
    done = []
    try:
        for source, target in moves:
            fault("export.publish")
            os.rename(source, target)
            done.append((source, target))
    except OSError:
        for source, target in reversed(done):
            os.rename(target, source)
        raise


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _forget_pages(path: Path) -> None:
    """Asks the system to drop its copy, so that the next reading is of the disk."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _check_header(path: Path, entries: Sequence[Entry]) -> None:
    """The library must find what was meant."""
    with open_tensors(path) as file:
        found = {n: (file.get_slice(n).get_dtype(), tuple(file.get_slice(n).get_shape())) for n in file.keys()}  # noqa: SIM118
    if found != {e.name: (DTYPE_NAMES[e.dtype], e.shape) for e in entries}:
        raise OSError(f"{path.name} does not hold the tensors that were written")


def _reason(error: Exception) -> str:
    said = getattr(error, "strerror", None) or (str(error) if isinstance(error, OSError) else "")
    return said or " ".join(f"{type(error).__name__}: {error}".split())
