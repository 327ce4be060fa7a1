"""What a power failure leaves of a save, at every point of it: the old checkpoint or the new one, whole.

SIGKILL does not test this: what was written and not fsynced survives a process, and does not survive its host.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ranks import run_ranks
from save_runs import crash_everywhere, state_after


@pytest.mark.parametrize("replace", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_state_resumes_from_the_old_or_the_new_checkpoint(tmp_path, replace):
    """`replace`: the new one takes the name of the old one, which must stay readable until then."""
    (counts,) = run_ranks(1, crash_everywhere, str(tmp_path), replace=replace)
    states = {k: v for k, v in counts.items() if k.startswith("resumes")}
    assert counts["after"] == 3
    assert counts["changes"] > 50, counts
    assert states.keys() == {"resumes 2", "resumes 3"}, states
    assert states["resumes 3"] >= 6
    assert states["resumes 2"] > 100


@pytest.mark.parametrize("forgotten", ["fsync", "fsync_folder"])
def test_a_save_that_forgets_an_fsync_is_caught(tmp_path, monkeypatch, forgotten):
    """The control: without fsyncs of files, or of folders, some state has no whole checkpoint, or none of the new."""
    (counts,) = run_ranks(1, forgetful, str(tmp_path), forgotten)
    assert counts["broken"] > 0


def forgetful(root: str, forgotten: str) -> dict[str, int]:
    """How many states at the end of a save do not resume from the new checkpoint, when fsyncs are left out."""
    from save_runs import DATA, job, put_back, recording, snapshot, start_alone, what_resumes

    folder = Path(root) / "run"
    saver = start_alone()
    saver.save(job(folder, 1), background=False)
    before = snapshot(folder)
    with recording(folder) as found:
        saver.save(job(folder, 2), background=False)
    changes = [c for c in found.changes if c[0] != forgotten]
    broken = 0
    for names_kept in (True, False):
        for data in DATA:
            put_back(state_after(before, changes, names_kept=names_kept, data=data), folder)
            broken += what_resumes(folder) != 2
    return {"broken": broken}


def test_the_model_of_a_disk():
    """A file without fsync loses its bytes, a name without fsync of its folder is lost, a rename moves a folder."""
    changes = [
        ("mkdir", "/r/.a"), ("create", "/r/.a/x", 0), ("write", 0, b"12"), ("fsync", 0), ("write", 0, b"34"),
        ("fsync_folder", "/r/.a"), ("rename", "/r/.a", "/r/a"), ("fsync_folder", "/r"),
    ]  # fmt: skip
    before = {"/r": None}
    assert state_after(before, changes, names_kept=True, data="kept") == {"/r": None, "/r/a": None, "/r/a/x": b"1234"}
    assert state_after(before, changes, names_kept=True, data="dropped")["/r/a/x"] == b"12"
    assert state_after(before, changes[:7], names_kept=False, data="kept") == {"/r": None}
    assert os.sep == "/"
