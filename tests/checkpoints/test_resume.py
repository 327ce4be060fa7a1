"""launch/train.py interrupted and resumed: the same metrics and the same model as in one go."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from launch_runs import command, finish, flags, make_inputs, read_json, read_metrics, start, train_here, wait_for
from ranks import run_ranks
from safetensors.torch import load_file

STEPS = 6
# of a row: how it came about
HOW = {"step_time_s", "tokens_per_second", "peak_memory_bytes"}
HOW |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def inputs(folder):
    return make_inputs(folder / "inputs")


@pytest.fixture(scope="module")
def cache(folder):
    return folder / "cache"


def arguments(inputs, output, **changes):
    chosen = {**inputs, "output_dir": str(output), "max_steps": STEPS, "learning_rate": 3e-3, "warmup_ratio": 0.25}
    chosen |= {"per_device_train_batch_size": 2, "max_length": 64, "prompt_template": "none", "save_steps": 2}
    return chosen | changes


def run_here(arguments, cache, ranks=2):
    """In forks; the ranks' results, after rank 0's exit code was looked at."""
    return run_ranks(ranks, train_here, flags(arguments), str(cache))


@pytest.fixture(scope="module")
def whole(folder, inputs, cache):
    """The run in one go."""
    output = folder / "whole"
    results = run_here(arguments(inputs, output), cache)
    assert [r["code"] for r in results] == [0, 0], results
    return output


def model_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def assert_same_run(whole: Path, resumed: Path) -> None:
    """Every row but for how it came about, and every weight, bit for bit."""
    for a, b in zip(read_metrics(whole), read_metrics(resumed), strict=True):
        assert [{k: v for k, v in row.items() if k not in HOW} for row in a] == [
            {k: v for k, v in row.items() if k not in HOW} for row in b
        ]
    models = model_of(whole), model_of(resumed)
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    assert read_json(resumed / "run_state.json")["state"] == "finished"


def test_checkpoints_every_two_steps_and_at_the_end(whole):
    names = sorted(p.name for p in whole.glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert (whole / "latest").read_text() == "checkpoint-6\n"


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"] if os.environ.get("FAULTS") == "long" else ["deepspeed"])
def test_sigterm_to_the_launcher(folder, inputs, cache, launcher):
    """It asks the ranks to end; the run says at which step it stopped, and `auto` goes on from there."""
    output, log = folder / f"ended-{launcher}", folder / f"{launcher}.log"
    process = start(command(launcher, arguments(inputs, output, save_steps=1000, max_steps=1000)), cache, log)
    wait_for(lambda: (output / "metrics.jsonl").exists() and read_metrics(output)[0], process)
    # the `deepspeed` command itself passes nothing on; its child, which starts the ranks, does
    asked = psutil.Process(process.pid).children()[0] if launcher == "deepspeed" else process
    asked.send_signal(signal.SIGTERM)
    finish(process)
    state = wait_ended(output)
    assert state["state"] == "preempted", log.read_text()
    assert (output / f"checkpoint-{state['step']}").is_dir()
    more = arguments(inputs, output, max_steps=state["step"] + 1, resume_from_checkpoint="auto")
    assert [r["code"] for r in run_here(more, cache)] == [0, 0]
    assert [row["step"] for row in read_metrics(output)[0]] == list(range(1, state["step"] + 2))


def wait_ended(output: Path, seconds: float = 60) -> dict:
    """run_state.json when it says something else than running: launchers return before their ranks."""
    end = time.monotonic() + seconds
    while (state := read_json(output / "run_state.json"))["state"] == "running" and time.monotonic() < end:
        time.sleep(0.1)
    return state


def test_one_rank_that_is_asked_ends_all(folder, inputs, cache, whole):
    """SIGUSR1 to rank 1 in the fourth step: both exit with 143 after it, and go on from there."""
    output = folder / "asked"
    asked = flags(arguments(inputs, output, save_steps=100))
    results = run_ranks(2, ask_in_step, asked, str(cache), rank=1, step=4)
    assert [r["code"] for r in results] == [143, 143], results
    assert (output / "report.html").exists()
    assert not (output / "spectra.json").exists()  # no time for them
    assert read_json(output / "run_state.json") == {"state": "preempted", "step": 4, "message": ""}
    run_here(arguments(inputs, output, resume_from_checkpoint=str(output / "checkpoint-4")), cache)
    assert_same_run(whole, output)


def ask_in_step(argv, cache, *, rank, step):
    from engine_runs import in_step

    in_step(rank, step, lambda: signal.raise_signal(signal.SIGUSR1))
    return train_here(argv, cache, draw=True)


def test_a_damaged_latest_checkpoint_is_passed_over(folder, inputs, cache, whole):
    """`auto` warns, takes the one before, and writes the lost steps again."""
    output = folder / "damaged"
    run_here(arguments(inputs, output), cache)
    file = next(output.glob("checkpoint-6/slice-00001*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    results = run_here(arguments(inputs, output, resume_from_checkpoint="auto"), cache)
    assert [r["code"] for r in results] == [0, 0], results
    assert "slice-00001.safetensors is damaged" in results[0]["stderr"]
    assert_same_run(whole, output)


def test_auto_begins_anew_where_there_is_nothing(folder, inputs, cache, whole):
    output = folder / "anew"
    results = run_here(arguments(inputs, output, resume_from_checkpoint="auto", save_strategy="no"), cache)
    assert [r["code"] for r in results] == [0, 0], results
    assert not list(output.glob("checkpoint-*"))
    assert_same_run(whole, output)


REFUSED = {
    "seed: 42 then, 7 now": {"seed": 7},
    "rows of a micro-batch: 2 then, 1 now": {"per_device_train_batch_size": 1},
    "checkpoint-6 does not fit this run: hd_pissa.slices is 2 in the checkpoint": {"slices": 4},
    "holds no checkpoint": {"resume_from_checkpoint": "nowhere"},
}


@pytest.mark.parametrize(
    "message", [next(iter(REFUSED)), *(pytest.param(m, marks=pytest.mark.slow) for m in [*REFUSED][1:])]
)
def test_what_does_not_fit_is_one_line_and_changes_nothing(folder, inputs, cache, whole, message, tmp_path):
    from launch_runs import listing, write_ds_config

    changes = {"resume_from_checkpoint": str(whole / "checkpoint-6"), **REFUSED[message]}
    if slices := changes.pop("slices", None):
        changes["ds_config"] = str(write_ds_config(tmp_path / "ds.json", hd_pissa={"r": 4, "slices": slices}))
        changes |= {"gradient_accumulation_steps": 2, "ignore_data_skip": True}
    before = listing(str(whole))
    results = run_here(arguments(inputs, tmp_path / "out", **changes), cache)
    assert [r["code"] for r in results] == [2, 2], results
    assert message in results[0]["stderr"]
    assert listing(str(whole)) == before


def test_a_refused_resume_costs_a_finished_run_nothing(folder, inputs, cache, whole, tmp_path):
    """In its own folder: what only shows when the model is there, and fewer steps than are done."""
    from launch_runs import write_ds_config

    def contents():
        return {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.name != ".lock"}

    output = tmp_path / "out"
    shutil.copytree(whole, output)
    before = contents()
    other = str(write_ds_config(tmp_path / "ds.json", hd_pissa={"r": 3}))
    for changes, message in (
        ({"ds_config": other}, "is 4 in the checkpoint, 3 here"),
        ({"max_steps": 4}, "max_steps is 4"),
    ):
        results = run_here(arguments(inputs, output, resume_from_checkpoint="auto", **changes), cache)
        assert [r["code"] for r in results] == [2, 2], results
        assert message in results[0]["stderr"]
        assert contents() == before


@pytest.mark.slow
def test_other_data_begin_anew_where_that_is_wanted(inputs, cache, whole, tmp_path):
    """--ignore_data_skip: what would be refused goes on, and its checkpoints are of the new data."""
    changes = {"resume_from_checkpoint": str(whole / "checkpoint-4"), "seed": 7, "ignore_data_skip": True}
    results = run_here(arguments(inputs, tmp_path / "out", **changes), cache)
    assert [r["code"] for r in results] == [0, 0], results
    manifest = read_json(tmp_path / "out" / "checkpoint-6" / "checkpoint.json")
    assert manifest["content"]["client_state"]["data"]["seed"] == 7
    assert [row["step"] for row in read_metrics(tmp_path / "out")[0]] == [5, 6]
