"""Runs in Trainer that stop and go on: what is kept, what comes back, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from ranks import run_ranks
from trainer_resume_runs import (
    best_elsewhere,
    best_not_saved,
    best_then_preempted,
    evaluated,
    finished_then_resumed,
    reported,
    second_pass,
    small_after_training,
)


def test_a_preempted_run_keeps_what_it_has_just_saved(tmp_path):
    """Beside a better one with save_total_limit=1; it goes on as if nothing had been, dropout and rate included."""
    found = run_ranks(2, best_then_preempted, str(tmp_path), {"slices": 2})[0]
    assert found["preempted"] == (True, 3, ["checkpoint-2", "checkpoint-3"])
    assert len(set(found["rates"])) > 1, "the rate never fell: nothing was shown"
    assert found["rates again"] == found["rates"]
    assert found["losses again"] == found["losses"]


def test_a_finished_run_is_resumed_to_no_further_step(tmp_path):
    """And from its middle it does the same once more, with the best of then."""
    found = run_ranks(2, finished_then_resumed, str(tmp_path), {"slices": 2})[0]
    assert found["steps"] == 4
    for name, weight in found["weights"].items():
        assert torch.equal(found["again"][name], weight)
        assert torch.equal(found["back"][name], weight)
    assert (found["best"], found["best at 2"]) == ("checkpoint-4\n", "checkpoint-2\n")
    written = [json.loads(line) for line in found["rows"].splitlines()]
    assert [row["step"] for row in written if "eval_a_loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in written if "eval_b_loss" in row] == [1, 2, 3, 4]


def test_a_small_checkpoint_is_not_added_to_weights_that_have_changed(tmp_path):
    found = run_ranks(2, small_after_training, str(tmp_path), {"slices": 2})
    assert [rank["error"] for rank in found] == ["CheckpointError"] * 2
    assert found[0]["steps"] == (4, 4)
    for name, weight in found[0]["before"].items():
        assert torch.equal(found[0]["after"][name], weight)


@pytest.mark.parametrize("async_save", [False, True])
def test_a_best_checkpoint_that_was_not_saved_is_not_the_best(async_save, tmp_path):
    found = run_ranks(2, best_not_saved, str(tmp_path), {"slices": 2}, async_save=async_save)[0]
    assert found["losses"][1] > found["losses"][0]
    assert found["best"] == str(tmp_path / "checkpoint-2")
    assert found["after"] == pytest.approx(found["losses"][0], rel=1e-6)


def test_evaluation_of_flat_rows_of_a_stream_and_of_what_is_not_finite(tmp_path):
    found = run_ranks(2, evaluated, str(tmp_path), {"slices": 2})[0]
    assert found["flat"] == pytest.approx(found["padded"], rel=1e-6)
    assert found["stream"] == pytest.approx(found["padded"], rel=1e-6)
    assert math.isnan(found["nan"])


def test_a_best_checkpoint_elsewhere_costs_none_here(tmp_path):
    found = run_ranks(2, best_elsewhere, str(tmp_path), {"slices": 2})[0]
    assert found["best"].startswith(str(tmp_path / "a"))
    assert found["kept"] == ["checkpoint-4"]


def test_a_stream_is_resumed_in_its_first_pass_only(tmp_path):
    assert run_ranks(1, second_pass, str(tmp_path), {"slices": 4}) == ["CheckpointError"]


def test_a_reporter_that_fails_does_not_end_the_run(tmp_path):
    found = run_ranks(2, reported, str(tmp_path), {"slices": 2})[0]
    assert len(found["losses"]) == 4
    assert found["written"] == pytest.approx(found["losses"][:1], rel=1e-6)
    assert len(found["warnings"]) == 1
