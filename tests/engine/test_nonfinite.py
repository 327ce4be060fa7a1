"""What is not finite on one rank: the step is skipped on all, nothing changes bitwise, and N of them end the run."""

from __future__ import annotations

import pytest
import torch
from fault_runs import run_with_fault, skip_one
from launch_runs import flags, make_inputs, read_json, read_metrics
from ranks import run_ranks
from tiny import ds_settings

STEPS, BAD = 3, 2  # the second step is the spoilt one
# point → what the refusal says; the tiny Llama has two layers
ONE = "on rank 1 gradients of 1 of 14 weights, in backward's order first model.layers."
ALL = "gradients of 14 of 14 weights, in backward's order first model.layers.1.mlp.down_proj's (of"
SITES = {
    "loss": f"the loss is nan and {ALL}",
    "loss.value": "a loss is not finite: on rank 1 the loss is nan",
    "grad.A": f"a gradient is not finite: {ONE}",
    "grad.B": f"a gradient is not finite: {ONE}",
}


@pytest.mark.parametrize("action", ["NAN", "INF"])
@pytest.mark.parametrize("point", SITES)
def test_the_step_is_skipped_on_all_ranks(point, action):
    """W, moments, running sums and Adam's t are bitwise what they were; the steps before and after are taken."""
    found = run_ranks(2, skip_one, ds_settings(), f"{point}:1:{BAD}:{action}", STEPS)
    words = SITES[point].replace("nan", "inf") if action == "INF" and point == "loss.value" else SITES[point]
    for steps, states, counts in found:
        assert [s.applied for s in steps] == [True, False, True]
        assert counts == (STEPS, 1, 0)
        same = {name: torch.equal(states[BAD - 1][name], states[BAD][name]) for name in states[BAD]}
        assert len(same) > 17
        assert all(same.values()), same
        assert not all(torch.equal(states[BAD][name], states[STEPS][name]) for name in same)
        refusal = steps[BAD - 1].refusal
        assert words.removeprefix("the loss is nan") in refusal if point == "loss" else words in refusal, refusal
        assert "rank 1" in refusal
    assert found[0][0] == found[1][0]  # the same word on both ranks


def test_ranks_that_share_a_slice_are_both_named():
    """After their gradients are summed nobody can tell whose it was."""
    found = run_ranks(2, skip_one, ds_settings(slices=1), f"grad.A:1:{BAD}:NAN", STEPS)
    assert "on ranks 0, 1 gradients of 1 of 14 weights" in found[0][0][BAD - 1].refusal


def arguments(inputs, output, **changes):
    chosen = {**inputs, "output_dir": str(output), "max_steps": 6, "learning_rate": 3e-3, "warmup_ratio": 0}
    chosen |= {"per_device_train_batch_size": 2, "max_length": 128, "prompt_template": "none", "max_skipped_steps": 3}
    return chosen | changes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    made = make_inputs(tmp_path_factory.mktemp("nonfinite"))
    made.pop("eval_dataset_name")
    return made


def test_skipped_steps_in_a_row_end_the_run(inputs, tmp_path):
    ends = run_with_fault(2, flags(arguments(inputs, tmp_path)), str(tmp_path / "cache"), "loss:1:*:NAN")
    words = "step 3 was skipped, and 3 in a row are enough (max_skipped_steps): a gradient is not finite: on rank 1"
    assert ends[0].code == 1
    (line,) = ends[0].errors
    assert words in line
    assert "model.layers.1.mlp.down_proj" in line
    assert "Traceback" not in ends[0].stderr
    state = read_json(tmp_path / "run_state.json")
    assert (state["state"], state["step"]) == ("failed", 3)
    assert state["message"].startswith(words)
    steps, _ = read_metrics(tmp_path)
    assert [row["skipped_steps"] for row in steps] == [1, 2, 3]
    assert {row["applied"] for row in steps} == {False}


@pytest.mark.parametrize(("most", "fault"), [(0, "loss:1:*:NAN"), (2, "loss:1:3:NAN")], ids=["never", "one in a row"])
def test_a_run_that_may_goes_on(inputs, tmp_path, most, fault):
    run = arguments(inputs, tmp_path, max_skipped_steps=most, max_steps=4)
    ends = run_with_fault(2, flags(run), str(tmp_path / "cache"), fault)
    assert [end.code for end in ends] == [0, 0], ends[0].stderr
    assert read_json(tmp_path / "run_state.json")["state"] == "finished"
