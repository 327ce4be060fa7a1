"""Atomic replacement of files: readers see the old content or the new, also after a crash."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import disk


@contextlib.contextmanager
def replacing(path: Path, point: str | None = None) -> Iterator[Path]:
    """A path beside `path` to write a file to; it takes `path`'s place when the block ends without an error.

    Several processes may replace the same file: the last one wins. Raises OSError.

    Args:
        point: where faults can be injected, as in `disk.rename`.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    draft.unlink(missing_ok=True)
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        disk.rename(draft, path, point)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def write_text(path: Path, text: str, point: str | None = None) -> None:
    """Gives a file a new content. Raises OSError."""
    with replacing(path, point) as draft:
        disk.write_file(draft, [text.encode()], point)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Gives a JSON file a new content; a path or a dtype is written as text. Raises OSError."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")
