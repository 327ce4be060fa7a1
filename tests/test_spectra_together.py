"""The spectra at the end of a run: what fails on one rank alone is one warning on all, and nobody is left waiting."""

from __future__ import annotations

import functools

from engine_runs import train_tiny
from ranks import run_ranks
from spectra_runs import spectra_with_faults, spectra_without_a_peer
from tiny import ds_settings

from hdpissa.engine.run_record import counted

# Where it fails, on which rank, and after how many weights on rank 0.
FAULTS = {
    "spectra:1:*:RAISE": ("rank 1: RuntimeError: HDPISSA_FAULT at spectra", 0),
    "pairs.prepare:1:*:EIO:3": ("rank 1: OSError: [Errno 5] Input/output error (HDPISSA_FAULT at pairs.prepare)", 2),
    "pairs.prepare:0:*:RAISE:4": ("rank 0: RuntimeError: HDPISSA_FAULT at pairs.prepare", 3),
    "alone.spectra:0:*:EIO:2": ("rank 0: OSError: [Errno 5] Input/output error (HDPISSA_FAULT at alone.spectra)", 1),
}


def test_an_error_on_one_rank_is_one_warning_on_all(tmp_path):
    """Two ranks, the faults one after another in one process group, which must be in order after each; then none."""
    after = functools.partial(spectra_with_faults, faults_in_turn=[*FAULTS, ""], folder=str(tmp_path))
    results = run_ranks(2, train_tiny, ds_settings(slices=2), steps=1, after=after)
    first, second = (result["after"] for result in results)
    for (words, weights), *told in zip(FAULTS.values(), first, second, strict=False):
        for rank, here in enumerate(told):
            done = weights if rank == 0 else 0
            assert here["warnings"] == [
                f"spectra of {counted(done, 'weight')}, then {words}; the run itself is complete"
            ]
            assert here["same_place"]
        found = told[0]["found"]
        assert (found and len(found["weights"])) == (weights or None), "what was found before stays"
    assert (first[-1]["warnings"], second[-1]["warnings"]) == ([], [])
    assert len(first[-1]["found"]["weights"]) == 14
    assert "problem" not in first[-1]["found"]


def test_a_lost_peer_is_still_a_loss():
    results = run_ranks(2, train_tiny, ds_settings(slices=2), steps=1, after=spectra_without_a_peer, lost_peer=True)
    assert [result["after"] for result in results] == ["loss", ""]
