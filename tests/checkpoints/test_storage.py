"""Disks that are full, break, or may not be written: all ranks say the same, nothing is lost, training goes on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from fault_runs import run_with_fault
from launch_runs import flags, make_inputs, read_json, train_here
from ranks import run_ranks
from save_runs import job, read_all, start_alone
from storage_runs import POINTS, save_in_background, streams_of_reads, train_through_failures, train_without
from tiny import ds_settings

from hdpissa.engine.checkpoint.reader import CheckpointReader

EVERY = 99


@pytest.mark.parametrize(
    ("action", "most"),
    [("EIO", 1), *(pytest.param(name, EVERY, marks=pytest.mark.slow) for name in ("ENOSPC", "EIO"))],
)
def test_every_call_of_a_save_fails_once(tmp_path, action, most):
    """On each rank, at every write, fsync and rename, or the first of each: the same failed save everywhere.

    Nothing is left of it, and nothing is lost.
    """
    config = ds_settings(slices=2)
    found = run_ranks(2, train_through_failures, config, str(tmp_path), action=action, steps=5, most=most, timeout=600)
    failures = found[0]["failures"]
    assert failures == found[1]["failures"]
    assert {(point, rank) for point, rank, _, _ in failures} == {(p, 0) for p in POINTS} | {
        (p, 1) for p in ("save.write", "save.fsync")
    }
    assert len(failures) > 60 or (most == 1 and len(failures) == len(POINTS) + 2)
    word = {"ENOSPC": "No space left on device", "EIO": "Input/output error"}[action]
    assert all(f"rank {rank}: {word}" in message for _, rank, _, message in failures)
    assert found[0]["left"] == []
    whole = run_ranks(2, train_without, config, steps=5, length=found[0]["steps"], timeout=600)[0]
    assert all(torch.equal(whole[n], w) for n, w in found[0]["weights"].items())
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    for folder in tmp_path.glob("checkpoint-*"):
        CheckpointReader(folder).check()


def test_a_save_in_the_background(tmp_path):
    """It fails on one rank: all are told in the same step, once. Another holds the weights of its own moment."""
    found = run_ranks(2, save_in_background, ds_settings(slices=2), str(tmp_path), action="EIO")
    assert found[0]["told"] == found[1]["told"]
    assert sum(bool(t) for t in found[0]["told"]) == 1
    assert "rank 1: Input/output error" in "".join(found[0]["told"])
    assert all(f["same"] for f in found)
    assert found[0]["found"] == ["checkpoint-3", "latest"]


def test_constant_files_are_read_beside_training(tmp_path):
    """On a stream that has waited for what wrote them; the others are copied before training goes on."""
    assert run_ranks(1, streams_of_reads, str(tmp_path)) == [{True: {"its own"}, False: {"training"}}]


def save_where_it_is_full(folder: str) -> tuple[str, int]:
    from hdpissa.engine.checkpoint.writer import SaveError

    saver = start_alone()
    saver.save(job(Path(folder), 1), background=False)
    filler = Path(folder, "filler")
    filler.write_bytes(bytes(max(0, os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize - 2**20)))
    try:
        saver.save(job(Path(folder), 2), background=False)
    except SaveError as error:
        filler.unlink()
        return str(error), read_all(Path(folder, "checkpoint-1"))
    return "it was saved", 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_disk_that_is_full(tmp_path):
    """A tmpfs of 24 MiB with 1 MiB left: told before a byte is written, with what it takes."""
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", tmp_path], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"this host mounts nothing: {mount.stderr.strip()}")
    try:
        ((message, step),) = run_ranks(1, save_where_it_is_full, str(tmp_path))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert "\n" not in message
    assert step == 1


def test_a_run_that_cannot_save_goes_on_or_stops(tmp_path):
    """The disk is full in every save: a warning and a finished run, or its end with --stop_on_save_error."""
    inputs = make_inputs(tmp_path / "inputs")
    for stop, code in ((False, 0), (True, 1)):
        output = tmp_path / f"out-{stop}"
        chosen = {**inputs, "output_dir": str(output), "max_steps": 3, "save_steps": 2, "max_length": 64}
        chosen |= {"prompt_template": "none", **({"stop_on_save_error": True} if stop else {})}
        ends = run_with_fault(2, flags(chosen), str(tmp_path / "cache"), "save.write:0:*:ENOSPC")
        assert [end.code for end in ends] == [code, code], ends
        assert read_json(output / "run_state.json")["state"] == ("failed" if stop else "finished")
        assert not list(output.glob("checkpoint-*"))


def test_a_run_that_is_asked_to_stop_and_cannot_save_says_so(tmp_path):
    """SIGTERM in the second step, every save fails: not "saved", and the state says why."""
    inputs, output = make_inputs(tmp_path / "inputs"), tmp_path / "out"
    chosen = {**inputs, "output_dir": str(output), "max_steps": 9, "max_length": 64, "prompt_template": "none"}
    results = run_ranks(2, stop_on_a_full_disk, flags(chosen), str(tmp_path / "cache"))
    assert [r["code"] for r in results] == [143, 143], results
    state = read_json(output / "run_state.json")
    assert (state["state"], state["step"]) == ("preempted", 2)
    assert "No space left on device" in state["message"]


def stop_on_a_full_disk(argv, cache):
    import signal

    from engine_runs import in_step

    from hdpissa.engine.files import disk

    write = disk.write_file

    def full(path, chunks, point="save"):
        if point == "save":
            raise OSError(28, "No space left on device")
        return write(path, chunks, point)

    disk.write_file = full
    in_step(1, 2, lambda: signal.raise_signal(signal.SIGTERM))
    return train_here(argv, cache)
