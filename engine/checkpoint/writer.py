"""Writing a checkpoint: every rank its own files, all or nothing, at once or in the background.

Phases, each ended by an agreement of all ranks (one small gather over gloo):

1. rank 0 makes the hidden folder `.checkpoint-N.partial` and looks whether the disk has room;
2. every rank writes and fsyncs its files there;
3. rank 0 writes the manifest, gives the folder its name, points `latest` to it, removes what is too old.

A failure of any rank in any phase is every rank's failure: the partial folder is removed, what was there before stays,
and `SaveError` has the same message on all ranks. In the background the phases run in a thread, over a process group
of their own, on copies in host memory; training goes on.

Knows tensors and names; `state.py` knows what they mean.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from .. import consensus
from ..distributed import heartbeat
from ..files import disk
from ..files.disk import FileRecord
from ..files.tensor_file import header
from . import directory
from .manifest import MANIFEST, Manifest, StoredFile

T = TypeVar("T")
# A save waits for its slowest rank's disk; training itself detects ranks that are lost.
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
        metadata: text in the header.
        text: the whole file where it holds no tensors.
    """

    name: str
    parts: Sequence[Part] = ()
    constant: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    text: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts) + len((self.text or "").encode())


@dataclass(frozen=True)
class Job:
    """A checkpoint to be written: where, what, how many to keep (None: all), and whether it is the best so far."""

    folder: Path
    files: list[OwnFile]
    manifest: Manifest  # without its files
    keep: int | None
    best: bool = False


class Saver:
    """A rank's end of every save of a run; `save`, `wait` are collective.

    Args:
        rank, world_size: of this process.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.home: Path | None = None  # checkpoint whose constant files can be linked
        self._records: dict[str, FileRecord] = {}  # of the constant files there
        self._group: dist.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        # Constant tensors are read in the thread; on training's own stream they would wait for it, and it for them.
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._failures: list[BaseException] = []  # that `wait` has not raised yet
        self._written = 0  # pieces; grows while a save gets on

    # --- what callers use ----------------------------------------------------------------------------

    def save(self, job: Job, *, background: bool) -> None:
        """Writes a checkpoint, after the one under way; in the background it returns when all is copied.

        If the one under way has failed, this one is written all the same, and `wait` raises later.

        Raises:
            SaveError: on all ranks: it failed before it returned.
        """
        self._join()
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        if not background:
            self._run(job)
            return
        staged: list[OwnFile] = []
        self._agree(job, lambda: staged.extend(_staged(job.files)))
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())  # which may still write what is constant from now on
        self._thread = threading.Thread(target=self._try, args=(replace(job, files=staged),), name="save", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Waits until nothing is under way; raises SaveError when what was under way, or one before it, has failed."""
        self._join()
        if self._failures:
            failure, self._failures = self._failures[0], []
            raise failure

    def _join(self) -> None:
        """Waits for the thread; counts as progress as long as something is being written."""
        before = self._written
        while self._thread is not None:
            self._thread.join(5.0)
            if not self._thread.is_alive():
                self._thread = None
            if self._written != before:
                heartbeat.progress()
                before = self._written

    @property
    def failed(self) -> bool:
        """Whether this rank knows of a failure that `wait` has not raised yet."""
        return bool(self._failures)

    def adopt(self, home: Path, records: dict[str, StoredFile]) -> None:
        """Takes the constant files of a checkpoint that was read as this run's."""
        self.home = home
        self._records = {name: FileRecord(r.bytes, r.sha256) for name, r in records.items()}

    # --- the phases ----------------------------------------------------------------------------------

    def _try(self, job: Job) -> None:
        try:
            with torch.cuda.stream(self._stream):  # None: as it is
                self._run(job)
        except BaseException as error:  # is raised by `wait`
            self._failures.append(error)

    def _run(self, job: Job) -> None:
        partial = directory.partial(job.folder)
        need = sum(self._agree(job, lambda: sum(f.nbytes for f in job.files if not self._can_link(f))))
        self._agree(job, lambda: self._prepare(job, partial, need))
        records = self._agree(job, lambda: self._write(partial, job.files))
        merged = {name: record for own in records for name, record in own.items()}
        self._agree(job, lambda: self._publish(job, partial, merged))
        if self.rank == 0:
            directory.retire(job.folder, job.keep)
        self.home = job.folder
        self._records = {f.name: merged[f.name] for f in job.files if f.constant}

    def _agree(self, job: Job, action: Callable[[], T]) -> list[T]:
        """Every rank's result, where all succeeded."""
        try:
            return consensus.gather(consensus.together(action, self._group), self._group)
        except consensus.RankFailedError as error:
            if self.rank == 0:
                with contextlib.suppress(OSError):  # a disk that fails may fail here, too; the next save cleans up
                    disk.remove(directory.partial(job.folder))
            text = f"{job.folder} was not saved ({error}); earlier checkpoints are as they were"
        raise SaveError(text)

    def _prepare(self, job: Job, partial: Path, need: int) -> None:
        if self.rank:
            return
        disk.make_folder(job.folder.parent)
        directory.clean(job.folder.parent)
        free = disk.free_bytes(job.folder.parent)
        if need + SPARE_BYTES > free:
            raise OSError(
                0, f"it needs {need + SPARE_BYTES} bytes and the disk has {free} free; make room, or save elsewhere"
            )
        partial.mkdir()

    def _can_link(self, file: OwnFile) -> bool:
        return file.constant and self.home is not None and (self.home / file.name).exists()

    def _link(self, file: OwnFile, path: Path) -> bool:
        """Links a constant file, if it still is what was written: a damaged one must not spread over checkpoints."""
        if not self._can_link(file):
            return False
        assert self.home is not None
        try:
            sound = disk.read_record(self.home / file.name) == self._records[file.name]
        except OSError:
            return False
        return sound and disk.link(self.home / file.name, path)

    def _write(self, partial: Path, files: list[OwnFile]) -> dict[str, FileRecord]:
        if not partial.is_dir():
            raise OSError(0, f"{partial} is not there on this host; all hosts must share the folder of checkpoints")
        written = {}
        for file in files:
            path = partial / file.name
            if self._link(file, path):
                written[file.name] = self._records[file.name]
            else:
                path.unlink(missing_ok=True)
                written[file.name] = disk.write_file(path, self._chunks(file))
        return written

    def _chunks(self, file: OwnFile) -> Iterator[bytes | memoryview]:
        if file.text is not None:
            yield file.text.encode()
            return
        yield header(((p.key, p.dtype, p.shape) for p in file.parts), file.metadata)
        for part in file.parts:
            values = part.read().detach().contiguous().cpu().view(-1).view(torch.uint8)
            for piece in values.split(WRITE_BYTES):
                yield memoryview(piece.numpy())
                self._written += 1  # the piece before this line is on its way
                if threading.current_thread() is threading.main_thread():
                    heartbeat.progress()

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
        directory.publish(partial, job.folder, best=job.best)


# --- copies ----------------------------------------------------------------------------------------


def _staged(files: Sequence[OwnFile]) -> list[OwnFile]:
    """The files with their values as they are now; constant ones may be read later.

    Raises:
        OSError: the host has no room for the copies; the kernel would end some process instead.
    """
    need = sum(file.nbytes for file in files if not file.constant)
    free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if need > free:
        raise OSError(
            0, f"the copies need {need} bytes of host memory, {free} are free per process; save without async"
        )
    return [file if file.constant else replace(file, parts=[_copy(p) for p in file.parts]) for file in files]


def _copy(part: Part) -> Part:
    """Pageable memory: torch rounds pinned blocks up to powers of two, and never gives them back."""
    values = part.read().detach()
    held = torch.empty(values.shape, dtype=values.dtype, device="cpu")
    held.copy_(values)  # complete when it returns
    return replace(part, read=lambda: held)
