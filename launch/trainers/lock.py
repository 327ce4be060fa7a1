"""One run per output folder at a time.

A launcher that is killed leaves its ranks behind, and they go on training, and saving, where the next run begins. So
rank 0 holds a lock on `.lock` in the folder for as long as its process lives; the kernel releases it however
the process ends. On a file system without locks none is held.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from hdpissa.engine import consensus
from hdpissa.engine.errors import ConfigError

_held: dict[Path, int] = {}  # descriptors; closing one gives the lock back


def lock_folder(folder: Path, rank: int) -> None:
    """Takes the lock, on rank 0, and tells all ranks; collective.

    Raises:
        ConfigError: on all ranks: another run holds it.
    """
    owner = consensus.from_rank0(lambda: _take(folder))
    if owner is not None:
        raise ConfigError(
            f"--output_dir {folder} is in use by another run (process {owner}): wait for its end, or end it (a "
            f"launcher that was killed leaves its ranks behind); or give another folder"
        )


def _take(folder: Path) -> str | None:
    """None, or whose it is."""
    if folder in _held:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 100).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        return holder
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()} on {os.uname().nodename}\n".encode())
    _held[folder] = descriptor
    return None
