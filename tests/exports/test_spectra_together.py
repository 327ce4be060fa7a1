"""The spectra at the end of a run: what fails on one rank alone is known to all, and nobody is left waiting."""

from __future__ import annotations

import functools

from engine_runs import train_tiny
from ranks import run_ranks
from report_runs import spectra_with_faults, spectra_without_a_peer
from tiny import ds_settings

# Where it fails, on which rank, and after how many weights on rank 0.
FAULTS = {
    "spectra:1:*:RAISE": ("rank 1: ", 0),
    "pairs.own_part:1:*:EIO:3": ("rank 1: ", 2),
    "pairs.own_part:0:*:RAISE:4": ("rank 0: ", 3),
    "single_rank.spectra:0:*:EIO:2": ("rank 0: ", 1),
}


def test_an_error_on_one_rank_is_known_to_all():
    """Two ranks, the faults one after another in one process group, which must be in order after each; then none."""
    after = functools.partial(spectra_with_faults, faults_in_turn=[*FAULTS, ""])
    results = run_ranks(2, train_tiny, ds_settings(slices=2), steps=1, after=after)
    first, second = (result["after"] for result in results)
    for (words, weights), *told in zip(FAULTS.values(), first, second, strict=False):
        assert told[0]["found"]["problem"] == told[1]["found"]["problem"]
        assert told[0]["found"]["problem"].startswith(words)
        assert [len(here["found"]["weights"]) for here in told] == [weights, 0], "what was found before stays"
        assert all(here["same_place"] for here in told)
    assert [here[-1]["found"]["problem"] for here in (first, second)] == ["", ""]
    assert len(first[-1]["found"]["weights"]) == 14


def test_a_lost_peer_is_still_a_loss():
    results = run_ranks(2, train_tiny, ds_settings(slices=2), steps=1, after=spectra_without_a_peer, lost_peer=True)
    assert [result["after"] for result in results] == ["loss", ""]
