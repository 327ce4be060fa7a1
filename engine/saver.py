"""Writing a checkpoint: every rank its own files, all ranks of one mind, at once or in the background.

Phases, each ended by an agreement of all ranks (one small gather over gloo):

1. rank 0 makes the hidden folder `.checkpoint-N.partial` and looks whether the disk has room;
2. every rank writes and fsyncs its files there;
3. rank 0 writes the manifest, gives the folder its name, points `latest` to it, removes what is too old.

A failure of any rank in any phase is every rank's failure: the partial folder is removed, what was there before stays,
and `SaveError` says the same on all ranks. In the background the phases run in a thread, over a process group
of their own, on copies in host memory; training goes on.

Knows tensors and names; what they mean is `checkpoint.py`'s business.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import disk, folders
from .checkpoint_format import MANIFEST, Manifest, StoredFile
from .disk import FileRecord
from .tensor_file import header

T = TypeVar("T")
# A save waits for its slowest rank's disk. Peers that are gone are noticed by training itself.
PATIENCE = datetime.timedelta(hours=2)
SPARE_BYTES = 2**24  # manifest, folder entries, rounding to blocks
WRITE_BYTES = 2**24  # at a time


class SaveError(RuntimeError):
    """A checkpoint was not saved; the ones before it are intact. One line, the same on all ranks."""


@dataclass(frozen=True)
class Part:
    """A tensor of a file.

    Attributes:
        read: returns its values, on any device; may alias what training changes, unless the file is constant.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class OwnFile:
    """A file that this rank writes.

    Attributes:
        constant: it is the same in every checkpoint of the run: linked where the last one's is still there.
        metadata: text beside the tensors.
    """

    name: str
    parts: Sequence[Part]
    constant: bool = False
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts)


@dataclass(frozen=True)
class Job:
    """A checkpoint to be written: where, what, and how many to keep (None: all)."""

    folder: Path
    files: list[OwnFile]
    manifest: Manifest  # without its files
    keep: int | None


class Saver:
    """A rank's end of every save of a run; `save`, `wait` are collective.

    Args:
        rank, world_size: of this process.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.home: Path | None = None  # checkpoint whose constant files can be linked
        self._records: dict[str, FileRecord] = {}  # of the constant files there
        self._group: Any = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    # --- what callers use ----------------------------------------------------------------------------

    def save(self, job: Job, *, background: bool) -> None:
        """Writes a checkpoint, after the one under way; in the background it returns when all is copied.

        Raises:
            SaveError: on all ranks: this one failed, or the one that was under way.
        """
        self.wait()
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        if not background:
            self._run(job)
            return
        staged = replace(job, files=[_staged(file) for file in job.files])
        self._thread = threading.Thread(target=self._try, args=(staged,), name="save", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is under way; raises SaveError when what was under way has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    @property
    def busy(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether this rank knows of a failure that `wait` has not raised yet."""
        return self._failure is not None

    def adopt(self, home: Path, records: dict[str, StoredFile]) -> None:
        """Takes the constant files of a checkpoint that was read as this run's."""
        self.home = home
        self._records = {name: FileRecord(r.bytes, r.sha256) for name, r in records.items()}

    # --- the phases ----------------------------------------------------------------------------------

    def _try(self, job: Job) -> None:
        try:
            self._run(job)
        except BaseException as error:  # is raised by `wait`
            self._failure = error

    def _run(self, job: Job) -> None:
        partial = folders.partial(job.folder)
        need = sum(self._agree(job, lambda: sum(f.nbytes for f in job.files if not self._can_link(f))))
        self._agree(job, lambda: self._prepare(job, partial, need))
        records = self._agree(job, lambda: self._write(partial, job.files))
        merged = {name: record for own in records for name, record in own.items()}
        self._agree(job, lambda: self._publish(job, partial, merged))
        self.home = job.folder
        self._records = {f.name: merged[f.name] for f in job.files if f.constant}

    def _agree(self, job: Job, action: Callable[[], T]) -> list[T]:
        """Every rank's result, where all succeeded."""
        result, problem = None, None
        try:
            result = action()
        except Exception as error:  # whatever it is: the other ranks wait for our word
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            problem = f"rank {self.rank}: {' '.join(str(reason).split())}"
        answers: list[Any] = [None] * self.world_size
        dist.all_gather_object(answers, (result, problem), group=self._group)
        problems = [p for _, p in answers if p]
        if problems:
            if self.rank == 0:
                disk.remove(folders.partial(job.folder))
            raise SaveError(f"{job.folder} was not saved ({problems[0]}); earlier checkpoints are as they were")
        return [r for r, _ in answers]

    def _prepare(self, job: Job, partial: Path, need: int) -> None:
        if self.rank:
            return
        disk.make_folder(job.folder.parent)
        folders.clean(job.folder.parent)
        free = disk.free_bytes(job.folder.parent)
        if need + SPARE_BYTES > free:
            raise OSError(
                0, f"it needs {need + SPARE_BYTES} bytes and the disk has {free} free; make room, or save elsewhere"
            )
        partial.mkdir()

    def _can_link(self, file: OwnFile) -> bool:
        return file.constant and self.home is not None and (self.home / file.name).exists()

    def _write(self, partial: Path, files: list[OwnFile]) -> dict[str, FileRecord]:
        if not partial.is_dir():
            raise OSError(0, f"{partial} is not there on this host; all hosts must share the folder of checkpoints")
        written = {}
        for file in files:
            path = partial / file.name
            if self._can_link(file) and disk.link(self.home / file.name, path):  # type: ignore[operator]
                written[file.name] = self._records[file.name]
            else:
                path.unlink(missing_ok=True)
                written[file.name] = disk.write_file(path, _chunks(file))
        return written

    def _publish(self, job: Job, partial: Path, records: dict[str, FileRecord]) -> None:
        if self.rank:
            return
        for name, record in records.items():
            path = partial / name
            if not path.exists() or path.stat().st_size != record.bytes:
                raise OSError(0, f"{name} was written, but rank 0 does not see it; all hosts must share the folder")
        stored = {n: StoredFile(bytes=r.bytes, sha256=r.sha256) for n, r in sorted(records.items())}
        manifest = job.manifest.model_copy(update={"files": stored})
        disk.write_file(partial / MANIFEST, [manifest.render().encode()])
        disk.sync_folder(partial)
        folders.publish(partial, job.folder)
        folders.retire(job.folder, job.keep)


def _chunks(file: OwnFile) -> Iterator[bytes | memoryview]:
    yield header(((p.key, p.dtype, p.shape) for p in file.parts), file.metadata)
    for part in file.parts:
        values = part.read().detach().contiguous().cpu().view(-1).view(torch.uint8)
        for piece in values.split(WRITE_BYTES):
            yield memoryview(piece.numpy())


# --- copies ----------------------------------------------------------------------------------------


def _staged(file: OwnFile) -> OwnFile:
    """The file with its values as they are now; constant ones may be read later."""
    if file.constant:
        return file
    return replace(file, parts=[_copy(part) for part in file.parts])


def _copy(part: Part) -> Part:
    values = part.read().detach()
    held = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.device.type == "cuda")
    held.copy_(values)
    return replace(part, read=lambda: held)


def seconds(action: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
