"""The checkpoint directories of an output folder: which is complete, which is the latest, how one replaces another.

    checkpoint-10/ checkpoint-20/       complete: a folder gets such a name only when all in it is on the disk
    latest                              the name of the one to resume from, as DeepSpeed has it
    best                                the name of the one with the best evaluation, which is never too old
    .checkpoint-30.partial/             being written, or left by a run that died
    .checkpoint-20.replaced/            while a new checkpoint-20 takes its place; counts until the new one has its name
    .checkpoint-10.removed/             being removed

Reads and renames only; what is inside a checkpoint is not looked at.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from ..distributed.faults import fault
from ..errors import ConfigError
from ..files import atomic, disk
from .manifest import MANIFEST

LATEST, BEST = "latest", "best"
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_HIDDEN = re.compile(r"\.(.+)\.(partial|replaced|removed)")


def check_tag(tag: str) -> str:
    """The tag; raises ConfigError unless it is a plain folder name."""
    if not _TAG.fullmatch(tag) or tag in (LATEST, BEST):
        raise ConfigError(
            f"checkpoint tag {tag[:80]!r}: must be letters, digits, '_', '-' and '.', as in checkpoint-100"
        )
    return tag


def partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def publish(written: Path, folder: Path, *, best: bool = False) -> None:
    """Gives a complete folder its name and makes it the latest one; raises OSError, the one before it in its place.

    Args:
        best: it is also the best one so far.
    """
    replaced = _replaced(folder) if folder.exists() else None
    if replaced is not None:
        disk.remove(replaced)
        disk.rename(folder, replaced)
    try:
        disk.rename(written, folder)
    except OSError:
        if replaced is not None and not folder.exists():
            os.rename(replaced, folder)
        raise
    fault("save.before_latest")
    atomic.write_text(folder.parent / LATEST, folder.name + "\n", "save")
    fault("save.after_latest")
    if best:
        atomic.write_text(folder.parent / BEST, folder.name + "\n", "save")
    if replaced is not None:
        disk.remove(replaced)


def retire(newest: Path, keep: int | None) -> None:
    """Removes the oldest checkpoints beyond `keep` that came before a numbered one, but never the best one.

    Those with a higher number are of a run that went on from further back; they are left alone. A folder that
    cannot be removed does not fail the save.
    """
    step = number(newest)
    if keep is None or step is None:
        return
    with contextlib.suppress(OSError):
        spared = best(newest.parent)
        for folder in [f for f in by_step(newest.parent) if number(f) < step][keep - 1 :]:  # type: ignore[operator]
            if folder.name != spared:
                disk.remove(folder)


def discard(parent: Path) -> None:
    """Removes all checkpoints: those of a run that is being replaced."""
    for pointer in (LATEST, BEST):
        (parent / pointer).unlink(missing_ok=True)
    for folder in by_step(parent):
        disk.remove(folder)
    clean(parent)


def clean(parent: Path) -> None:
    """Removes what runs that died have left, and gives a replaced checkpoint its name back where that is free."""
    for path in sorted(parent.iterdir()):
        match = _HIDDEN.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        if match[2] == "replaced" and not (parent / match[1]).exists():
            disk.rename(path, parent / match[1])
        else:
            disk.remove(path)


def number(folder: Path) -> int | None:
    """N of checkpoint-N."""
    text = folder.name.removeprefix("checkpoint-")
    return int(text) if text != folder.name and text.isdecimal() else None


def by_step(parent: Path) -> list[Path]:
    """The complete folders named checkpoint-N, newest first."""
    found = [(number(path), path) for path in parent.glob("checkpoint-*") if (path / MANIFEST).is_file()]
    return [path for step, path in sorted(found, reverse=True) if step is not None]  # type: ignore[type-var]


def candidates(parent: Path) -> list[Path]:
    """Where to resume from, best first: what `latest` names, then what was saved before it, newest first.

    A checkpoint with a higher number than the latest is of a run that was left behind. One that is just being replaced
    counts as long as its name is free.
    """
    named = latest(parent)
    first = [p for p in (_whole(parent / named) if named else None,) if p]
    last = number(parent / named) if named else None
    folders = {p.name for p in by_step(parent)} | {p.name[1:-9] for p in parent.glob(".checkpoint-*.replaced")}
    steps = sorted((number(parent / name), name) for name in folders if number(parent / name) is not None)
    older = [name for step, name in reversed(steps) if name != named and (last is None or step < last)]  # type: ignore[operator]
    return first + [p for name in older if (p := _whole(parent / name))]


def _whole(folder: Path) -> Path | None:
    """The folder, or its predecessor while it is being replaced."""
    return next((p for p in (folder, _replaced(folder)) if (p / MANIFEST).is_file()), None)


def latest(parent: Path) -> str | None:
    """The name in `latest`; None where there is no such file, or no valid name in it."""
    return _named(parent / LATEST)


def best(parent: Path) -> str | None:
    """The name in `best`; None where there is no such file, or no valid name in it."""
    return _named(parent / BEST)


def point_to_best(parent: Path, tag: str | None) -> None:
    """Points `best` to a checkpoint; None removes it."""
    if tag is None:
        (parent / BEST).unlink(missing_ok=True)
    else:
        atomic.write_text(parent / BEST, tag + "\n", "save")


def _named(pointer: Path) -> str | None:
    try:
        tag = pointer.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return tag if _TAG.fullmatch(tag) else None
