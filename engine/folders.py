"""The checkpoints of an output folder: which there are, which is the latest, in what order one takes another's place.

    checkpoint-10/ checkpoint-20/       complete: a folder gets such a name only when all in it is on the disk
    latest                              the name of the one to resume from, as DeepSpeed has it
    .checkpoint-30.partial/             being written, or left by a run that died
    .checkpoint-20.replaced/            while a new checkpoint-20 takes its place; counts until the new one has its name
    .checkpoint-10.removed/             being removed

Reads and renames only; what is inside a checkpoint is not looked at.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import disk
from .checkpoint_format import MANIFEST
from .errors import ConfigError
from .faults import fault

LATEST = "latest"
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_HIDDEN = re.compile(r"\.(.+)\.(partial|replaced|removed)")


def check_tag(tag: str) -> str:
    """Raises ConfigError for what is no plain folder name."""
    if not _TAG.fullmatch(tag) or tag == LATEST:
        raise ConfigError(
            f"checkpoint tag {tag[:80]!r}: must be letters, digits, '_', '-' and '.', as in checkpoint-100"
        )
    return tag


def partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def publish(written: Path, folder: Path) -> None:
    """Gives a complete folder its name and makes it the latest one."""
    if folder.exists():
        disk.remove(_replaced(folder))
        disk.rename(folder, _replaced(folder))
    disk.rename(written, folder)
    fault("save.before_latest")
    disk.replace_text(folder.parent / LATEST, folder.name + "\n")
    fault("save.after_latest")
    disk.remove(_replaced(folder))


def retire(newest: Path, keep: int | None) -> None:
    """Removes the oldest checkpoints beyond `keep`, never the newest one."""
    if keep is None:
        return
    older = [folder for folder in by_step(newest.parent) if folder != newest]
    for folder in older[max(0, keep - 1) :]:
        disk.remove(folder)


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


def by_step(parent: Path) -> list[Path]:
    """The complete folders named checkpoint-N, newest first."""
    found = []
    for path in parent.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal() and (path / MANIFEST).is_file():
            found.append((int(number), path))
    return [path for _, path in sorted(found, reverse=True)]


def candidates(parent: Path) -> list[Path]:
    """Where to resume from, best first: the latest one, then the others by their number, newest first."""
    found = by_step(parent)
    replaced = [p for p in parent.glob(".checkpoint-*.replaced") if not (parent / p.name[1:-9]).exists()]
    named = latest(parent)
    first = [p for p in (named and parent / named,) if p and (p / MANIFEST).is_file()]
    return first + [p for p in (*replaced, *found) if p not in first]


def latest(parent: Path) -> str | None:
    """The name in `latest`; None where there is none, or it is no name."""
    try:
        tag = (parent / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return tag if _TAG.fullmatch(tag) else None
