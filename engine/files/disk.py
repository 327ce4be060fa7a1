"""Changes to the file system that survive a crash: what is renamed into place has been written and fsynced before.

All that a checkpoint does to the disk goes through here, one small primitive each, so that tests can record the order
of the calls, replay every prefix of it as after a power failure, and let any of them fail. Nothing here knows what
a checkpoint is.

Rules, after "All File Systems Are Not Created Equal" (Pillai et al., OSDI 2014): a file's bytes are safe after
fsync of the file, its name after fsync of its folder; a rename replaces atomically, but may reach the disk before
bytes that were not fsynced.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..distributed.faults import fault

Chunk = bytes | memoryview


@dataclass(frozen=True)
class FileRecord:
    """What a complete file holds: its bytes, and their SHA-256 in hex."""

    bytes: int
    sha256: str


def write_file(path: Path, chunks: Iterable[Chunk], point: str | None = "save") -> FileRecord:
    """Writes a new file and fsyncs it; raises OSError. The folder's entry is not safe before `sync_folder`.

    Args:
        point: where faults can be injected: `point`.write and `point`.fsync. None: nowhere.
    """
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for chunk in chunks:
            _write_all(descriptor, memoryview(chunk).cast("B"), point)
            digest.update(chunk)
            size += len(memoryview(chunk).cast("B"))
        _fault(point, "fsync")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(size, digest.hexdigest())


def _fault(point: str | None, call: str) -> None:
    if point is not None:
        fault(f"{point}.{call}")


def _write_all(descriptor: int, data: memoryview, point: str | None) -> None:
    while data:
        _fault(point, "write")
        data = data[os.write(descriptor, data) :]


def read_record(path: Path, chunk_bytes: int = 2**22) -> FileRecord:
    """The record of a file as it is; raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(chunk_bytes):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def sync_folder(folder: Path, point: str | None = "save") -> None:
    """Makes the names in a folder safe."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _fault(point, "fsync_folder")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path, point: str | None = "save") -> None:
    """Renames within a folder and makes it safe; an existing file is replaced, a folder must not exist."""
    _fault(point, "before_rename")
    os.rename(source, target)
    _fault(point, "after_rename")
    sync_folder(target.parent, point)


def link(existing: Path, new: Path) -> bool:
    """Gives a complete file a second name; False where the file is gone, or the file system has no hard links."""
    try:
        fault("save.link")
        os.link(os.path.realpath(existing), new)  # a link to a symbolic link would dangle somewhere else
    except OSError:
        return False
    return True


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, names safe."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    fault("save.make_folder")
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def remove(folder: Path) -> None:
    """Removes a folder with all it holds, as far as that is possible.

    A folder with a visible name gets a hidden one first, so that a partly removed one is never taken for complete.
    """
    if not folder.exists():
        return
    hidden = folder
    if not folder.name.startswith("."):
        hidden = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rename(folder, hidden)
    fault("save.remove")
    shutil.rmtree(hidden, ignore_errors=True)


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user may still write on the file system of a folder or its first existing parent."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
