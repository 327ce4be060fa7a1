"""Saves without a model: what `saver` writes, for tests of the disk. Functions here run inside `ranks.run_ranks`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hdpissa.engine.checkpoint import directory
from hdpissa.engine.checkpoint import manifest as manifests
from hdpissa.engine.checkpoint.manifest import Base, CheckpointError, Manifest, TargetSpec
from hdpissa.engine.checkpoint.reader import CheckpointReader
from hdpissa.engine.checkpoint.writer import Job, OwnFile, Part, Saver

SLICES, WORLD = 2, 2
TARGET = TargetSpec(name="layer.q_proj", rows=40, cols=48, r=2, scale=1.0)


def job(folder: Path, step: int, keep: int | None = None) -> Job:
    """A full checkpoint of one weight, as two ranks would write it.

    Values are the step's number, and by slice or rank a quarter more.
    """
    return Job(folder / f"checkpoint-{step}", list(_files(float(step))), _manifest(step), keep)


def _files(value: float) -> Iterator[OwnFile]:
    t = TARGET
    half = t.rows * t.cols // WORLD
    for rank in range(WORLD):
        key = manifests.range_key(t.name, rank * half, (rank + 1) * half)
        yield OwnFile(manifests.weights_file(rank, WORLD), [_part(key, (half,), value)])
        yield OwnFile(manifests.rng_file(rank), [_part("cpu", (16,), value + rank / 4)])
    for i in range(SLICES):
        names = [f"{t.name}.{state}" for state in manifests.STATE]
        parts = [_part(f"{n}_{side}", _shape(side), value + i / 4) for n in names for side in "AB"]
        yield OwnFile(manifests.slice_file(i), parts)
        fixed = [_part(f"{t.name}.{side}", _shape(side), i / 4) for side in "AB"]
        yield OwnFile(manifests.factors_file(i), fixed, constant=True)


def _shape(side: str) -> tuple[int, int]:
    return (TARGET.r, TARGET.cols) if side == "A" else (TARGET.rows, TARGET.r)


def _part(key: str, shape: tuple[int, ...], value: float) -> Part:
    return Part(key, shape, torch.float32, lambda: torch.full(shape, value))


def _manifest(step: int) -> Manifest:
    base = Base(name_or_path="", dtype="float32", checksums={"layer.q_proj.weight": "00"})
    return Manifest(
        kind="full", step=step, skipped_steps=0, skipped_in_a_row=0, adam={}, exact=True,
        updates=step, largest_grad=1.0, learning_rate=1e-3, world_size=WORLD,
        slices=SLICES, second_order=True, residual=None, init_residual=0.0, init_worst="", targets=[TARGET], base=base,
        versions={}, client_state={}, files={},
    )  # fmt: skip


def read_all(folder: Path) -> int:
    """The step of a checkpoint, after everything in it was read; raises CheckpointError."""
    reader = CheckpointReader(folder)
    reader.check()
    step = reader.manifest.step
    values = [reader.weights(TARGET.name, 0, TARGET.rows * TARGET.cols)]
    for i in range(SLICES):
        values += [part - i / 4 for _, _, A, B in reader.slice_state(i) for part in (A, B)]
        assert all((f == i / 4).all() for f in reader.factors(i, TARGET.name))
    for rank in range(WORLD):
        values.append(reader.rng(rank)[0]["cpu"] - rank / 4)
    assert all((v == step).all() for v in values), "a mix of two checkpoints"
    return step


def what_resumes(folder: Path) -> int | None:
    """The step that `auto` would resume from; None where it finds nothing whole."""
    for candidate in directory.candidates(folder) if folder.is_dir() else []:
        try:
            return read_all(candidate)
        except CheckpointError:
            continue
    return None


def start_alone() -> Saver:
    from hdpissa.engine.sharding import zero3

    zero3.init_distributed()
    return Saver(0, 1)


# --- recording what reaches the disk ---------------------------------------------------------------


@dataclass
class Recording:
    """Changes of the file system in order; `files` holds each file's writes by its number."""

    changes: list[tuple] = field(default_factory=list)


@contextmanager
def recording(root: Path) -> Iterator[Recording]:
    """Records what is changed under a folder by any function of `os`."""
    found, numbers, opened = Recording(), iter(range(10**6)), {}
    saved = {n: getattr(os, n) for n in ("open", "write", "fsync", "rename", "link", "mkdir", "unlink", "rmdir")}

    def path_of(path, dir_fd=None) -> str | None:
        text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path) if dir_fd is not None else os.fspath(path)
        return text if str(text).startswith(str(root)) else None

    def note(name):
        def call(*args, **kwargs):
            result = saved[name](*args, **kwargs)
            if name in ("rename", "link"):
                found.changes.append((name, path_of(args[0]), path_of(args[1])))
            elif path := path_of(args[0], kwargs.get("dir_fd")):
                found.changes.append((name, path))
            return result

        return call

    def open_(path, flags, *args, **kwargs):
        descriptor = saved["open"](path, flags, *args, **kwargs)
        if where := path_of(path, kwargs.get("dir_fd")):
            number = next(numbers) if flags & os.O_CREAT else None
            opened[descriptor] = (where, number)
            if number is not None:
                found.changes.append(("create", where, number))
        return descriptor

    def write(descriptor, data):
        written = saved["write"](descriptor, data)
        found.changes.append(("write", opened[descriptor][1], bytes(data[:written])))
        return written

    def fsync(descriptor):
        saved["fsync"](descriptor)
        where, number = opened[descriptor]
        found.changes.append(("fsync_folder", where) if number is None else ("fsync", number))

    replaced = {n: note(n) for n in ("rename", "link", "mkdir", "unlink", "rmdir")}
    for name, function in {**replaced, "open": open_, "write": write, "fsync": fsync}.items():
        setattr(os, name, function)
    try:
        yield found
    finally:
        for name, function in saved.items():
            setattr(os, name, function)


# --- what a crash leaves of it ---------------------------------------------------------------------

DATA = ("kept", "dropped", "torn")
PAGE = 4096


def state_after(before: dict[str, bytes | None], changes: list[tuple], *, names_kept: bool, data: str) -> dict:
    """path → content (None: a folder) after a power failure behind the last of `changes`.

    Args:
        before: on the disk at the start.
        names_kept: changes of a folder that no later fsync of it covers are there all the same; else they are lost.
        data: what of a file's bytes behind its last fsync: all, none, or whole pages up to the middle of them.
    """
    contents = _contents(changes, data)
    tree: dict[str, object] = dict(before)
    for at, (name, *args) in enumerate(changes):
        where = os.path.dirname(args[-1] if name in ("rename", "link") else str(args[0]))
        if not names_kept and not any(c == ("fsync_folder", where) for c in changes[at:]):
            continue
        _change(tree, name, args)
    found = {}
    for path, value in tree.items():
        parents_there = all(str(p) in tree or not _under(p, tree) for p in Path(path).parents)
        if parents_there:
            found[path] = contents[value] if isinstance(value, int) else value
    return found


def _under(path: Path, tree: dict) -> bool:
    """Whether a folder is one of those that are recorded, and not above all of them."""
    top = min((len(Path(p).parts) for p in tree), default=0)
    return len(path.parts) >= top


def _contents(changes: list[tuple], data: str) -> dict[int, bytes]:
    safe: dict[int, bytes] = {}
    all_: dict[int, bytes] = {}
    for name, *args in changes:
        if name == "create":
            safe[args[1]] = all_[args[1]] = b""
        elif name == "write":
            all_[args[0]] += args[1]
        elif name == "fsync":
            safe[args[0]] = all_[args[0]]
    if data == "kept":
        return all_
    if data == "dropped":
        return safe
    return {n: all_[n][: len(safe[n]) + (len(all_[n]) - len(safe[n])) // 2 // PAGE * PAGE] for n in all_}


def _change(tree: dict, name: str, args: list) -> None:
    if name == "create":
        tree[args[0]] = args[1]
    elif name == "mkdir":
        tree[args[0]] = None
    elif name in ("unlink", "rmdir"):
        tree.pop(args[0], None)
    elif name == "link" and args[0] in tree:
        tree[args[1]] = tree[args[0]]
    elif name == "rename" and args[0] in tree:
        for path in [p for p in tree if p == args[0] or p.startswith(args[0] + os.sep)]:
            tree[args[1] + path[len(args[0]) :]] = tree.pop(path)


def snapshot(root: Path) -> dict[str, bytes | None]:
    return {str(p): None if p.is_dir() else p.read_bytes() for p in [root, *sorted(root.rglob("*"))]}


def put_back(tree: dict, root: Path) -> None:
    """Makes the folder what a state says."""
    shutil.rmtree(root, ignore_errors=True)
    for path in sorted(p for p, content in tree.items() if content is None):
        Path(path).mkdir(parents=True, exist_ok=True)
    for path, content in tree.items():
        if content is not None and Path(path).parent.is_dir():
            Path(path).write_bytes(content)


def crash_everywhere(root: str, *, replace: bool = False) -> dict[str, int]:
    """Saves twice, and once more while every change is recorded; looks what resumes from every state of a crash.

    Args:
        replace: the recorded save has the name of the one before.

    Returns: how many states resume from which step.
    """
    folder = Path(root) / "run"
    saver = start_alone()
    for step in (1, 2):
        saver.save(job(folder, step, keep=2), background=False)
    before = snapshot(folder)
    with recording(folder) as found:
        third = job(folder, 3, keep=2)
        if replace:
            third = Job(folder / "checkpoint-2", third.files, third.manifest, third.keep)
        saver.save(third, background=False)
    after = what_resumes(folder)
    counts: dict[str, int] = {"changes": len(found.changes), "after": after or 0}
    for prefix in range(len(found.changes) + 1):
        for names_kept in (True, False):
            for data in DATA:
                tree = state_after(before, found.changes[:prefix], names_kept=names_kept, data=data)
                put_back(tree, folder)
                step = what_resumes(folder)
                counts[f"resumes {step}"] = counts.get(f"resumes {step}", 0) + 1
    return counts
