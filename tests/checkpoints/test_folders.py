"""Which checkpoint is resumed from, which are removed, and that a damaged file does not spread."""

from __future__ import annotations

import os
from pathlib import Path

from ranks import run_ranks
from save_runs import job, read_all, start_alone, what_resumes

from hdpissa.engine.checkpoint import directory
from hdpissa.engine.checkpoint.writer import Job, SaveError
from hdpissa.engine.distributed import faults
from hdpissa.engine.files import disk


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def save_damage_save(root: str) -> list:
    """A bit of a factor file flips on the disk; the checkpoints after it are linked to that file, or are they."""
    folder, saver = Path(root), start_alone()
    for step in (1, 2):
        saver.save(job(folder, step), background=False)
    path = folder / "checkpoint-2" / "factors-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)  # in place: all names of it
    saver.save(job(folder, 3), background=False)
    saver.save(job(folder, 4), background=False)
    inodes = [(folder / f"checkpoint-{n}" / path.name).stat().st_ino for n in (1, 2, 3, 4)]
    return [what_resumes(folder), [inodes[0] == inodes[1], inodes[1] == inodes[2], inodes[2] == inodes[3]]]


def test_a_damaged_factor_file_is_written_anew(tmp_path):
    ((step, linked),) = run_ranks(1, save_damage_save, str(tmp_path))
    assert step == 4
    assert linked == [True, False, True]


def go_back(root: str) -> dict:
    """Steps 4, 6, 8; then a run goes on from 4 and saves 5, keeping two."""
    folder, saver = Path(root), start_alone()
    for step in (4, 6, 8):
        saver.save(job(folder, step), background=False)
    saver.save(job(folder, 5, keep=2), background=False)
    first = [p.name for p in directory.candidates(folder)]
    disk.remove(folder / "checkpoint-5")
    return {"found": names(folder), "first": first, "then": [p.name for p in directory.candidates(folder)]}


def test_what_a_run_left_behind_is_neither_taken_nor_removed(tmp_path):
    (found,) = run_ranks(1, go_back, str(tmp_path))
    assert found["first"] == ["checkpoint-5", "checkpoint-4"]
    assert found["then"] == ["checkpoint-4"]
    assert found["found"] == ["checkpoint-4", "checkpoint-6", "checkpoint-8", "latest"]


def tags(root: str) -> dict:
    """A tag that is no number: it keeps the numbered ones, and survives a failure while it is replaced."""
    folder, saver = Path(root), start_alone()
    for step in (1, 2):
        saver.save(job(folder, step), background=False)
    best = [Job(folder / "best", *(getattr(job(folder, n), f) for f in ("files", "manifest")), 1) for n in (3, 4)]
    saver.save(best[0], background=False)
    kept = names(folder)
    faults._fault = faults.Fault("save.before_rename", None, None, "EIO", 4)  # the folder's, behind the replaced one's
    faults._passages.clear()
    faults._passages["save.before_rename", 0] = 2
    try:
        saver.save(best[1], background=False)
        failed = ""
    except SaveError as error:
        failed = str(error)
    faults._fault = None
    os.rename(folder / "best", folder / ".best.replaced")  # as a power failure may leave it
    return {"kept": kept, "failed": failed, "first": directory.candidates(folder)[0].name, "step": what_resumes(folder)}


def test_tags_that_are_no_numbers(tmp_path):
    (found,) = run_ranks(1, tags, str(tmp_path))
    assert found["kept"] == ["best", "checkpoint-1", "checkpoint-2", "latest"]
    assert "Input/output error" in found["failed"]
    assert (found["first"], found["step"]) == (".best.replaced", 3)


def fail_then_save(root: str) -> list:
    """A save in the background fails; the next one is written all the same, and the failure told after it."""
    folder, saver = Path(root), start_alone()
    faults._fault = faults.Fault("save.fsync", None, None, "EIO", 1)
    saver.save(job(folder, 1), background=True)
    saver._join()
    faults._fault = None
    saver.save(job(folder, 2), background=False)
    try:
        saver.wait()
        told = ""
    except SaveError as error:
        told = str(error)
    saver.wait()  # told once
    return [told, read_all(folder / "checkpoint-2")]


def test_a_failed_save_does_not_take_the_next_one_with_it(tmp_path):
    ((told, step),) = run_ranks(1, fail_then_save, str(tmp_path))
    assert "checkpoint-1" in told
    assert step == 2


def test_discard_leaves_no_checkpoint(tmp_path):
    for name in ("checkpoint-3", "checkpoint-12", ".checkpoint-4.partial", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.json").write_text("{}")
    (tmp_path / "latest").write_text("checkpoint-3")
    directory.discard(tmp_path)
    assert names(tmp_path) == ["model"]
