"""A rank that hangs, dies, or raises where the others do not: they end in time, and name that rank and its step."""

from __future__ import annotations

import os
import time

import pytest
from fault_runs import run_with_fault
from launch_runs import command, finish, flags, make_inputs, read_json, read_metrics, start

HANG_S = 10  # --hang_timeout
# so short a limit is overrun by some seconds, see `watch.query_after_s`
MOST_S = HANG_S + 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def inputs(folder):
    made = make_inputs(folder / "inputs")
    made.pop("eval_dataset_name")
    return made


@pytest.fixture(scope="module")
def cache(folder, inputs):
    return str(folder / "cache")


def arguments(inputs, output, **changes):
    chosen = {**inputs, "output_dir": str(output), "max_steps": 4, "learning_rate": 3e-3, "warmup_ratio": 0}
    chosen |= {"per_device_train_batch_size": 2, "max_length": 128, "prompt_template": "none"}
    return chosen | {"hang_timeout": HANG_S} | changes


# fault → (ranks, what the others say of it). Steps count from 1, and 0 is before the first.
HANGS = {
    "step.data:1:3:SLEEP": (2, "rank 1 on {host} hangs in step 3, data"),
    "step.backward:0:2:SLEEP": (2, "rank 0 on {host} hangs in step 2, backward"),
    "step.exchange:2:2:SLEEP": (4, "rank 2 on {host} hangs in step 2, exchange"),
    "single_rank.record:0:0:SLEEP": (2, "rank 0 on {host} hangs in single-rank work: record, before the first step"),
    "single_rank.card:0:4:SLEEP": (2, "rank 0 on {host} hangs in step 4, single-rank work: card"),
    "export:1:4:SLEEP:3": (2, "rank 1 on {host} hangs in step 4, export"),
    "step.vote:1:2:STOP": (3, "rank 1 on {host} does not answer: stopped"),
    "step.forward:0:2:STOP": (2, "rank 0 on {host} does not answer: stopped"),
    "step.apply:1:2:GIL": (2, "rank 1 on {host} does not answer: stopped, or stuck in code"),
}
DEATHS = {
    "step.voted:1:2:KILL": (3, "rank 1 on {host} ended early (killed, or"),
    "step.forward:0:2:KILL": (2, "rank 0 on {host} ended early (killed, or"),
    "apply.weight:1:2:RAISE:7": (2, "rank 1 on {host} failed in step 2, apply (RuntimeError: HDPISSA_FAULT"),
    "single_rank.metrics:0:2:RAISE": (3, "rank 0 on {host} failed in step 2, single-rank work: metrics (RuntimeError"),
    "single_rank.record:0:0:ENOSPC": (2, "rank 0 on {host} failed in single-rank work: record, before the first step"),
    "single_rank.card:0:4:RAISE": (2, "rank 0 on {host} failed in step 4, single-rank work: card (RuntimeError"),
}


# Each costs a run and the limit. The short form has one of each kind; FAULTS=long has all.
SHORT = {
    "step.data:1:3:SLEEP",
    "step.forward:0:2:STOP",
    "step.voted:1:2:KILL",
    "apply.weight:1:2:RAISE:7",
    "single_rank.metrics:0:2:RAISE",
    "single_rank.record:0:0:ENOSPC",
}


def chosen(faults):
    return [fault for fault in faults if fault in SHORT or os.environ.get("FAULTS") == "long"]


def host() -> str:
    import socket

    return f"{socket.gethostname()} (127.0.0.1)"


def last_row(output) -> float:
    """When the last step was recorded, as `time.monotonic` has it."""
    return (output / "metrics.jsonl").stat().st_mtime - time.time() + time.monotonic()


@pytest.mark.parametrize("fault", chosen(HANGS))
def test_a_rank_that_hangs_is_named_in_time(folder, inputs, cache, fault):
    ranks, words = HANGS[fault]
    output = folder / fault.replace(":", "_")
    ends = run_with_fault(ranks, flags(arguments(inputs, output)), cache, fault)
    moved, bad = last_row(output), int(fault.split(":")[1])
    for rank, end in enumerate(ends):
        if rank == bad and fault.split(":")[3] in ("STOP", "GIL"):
            assert end.code is None  # nothing in it can run
            continue
        (line,) = end.errors
        assert (end.code, words.format(host=host()) in line) == (1, True), line
        assert f"--hang_timeout {HANG_S} s" in line
        assert "Traceback" not in end.stderr
        if not fault.startswith(("single_rank.card", "export")):  # there other work lies between the row and the fault
            assert end.at - moved < MOST_S
    assert_failed(output, words)


@pytest.mark.parametrize("fault", chosen(DEATHS))
def test_a_rank_that_dies_or_raises_is_named_at_once(folder, inputs, cache, fault):
    ranks, words = DEATHS[fault]
    output = folder / fault.replace(":", "_")
    ends = run_with_fault(ranks, flags(arguments(inputs, output)), cache, fault)
    bad = int(fault.split(":")[1])
    for rank, end in enumerate(ends):
        if rank != bad:
            (line,) = end.errors
            assert (end.code, words.format(host=host()) in line) == (1, True), line
            assert end.at - ends[bad].at < HANG_S
    assert ends[bad].code not in (0, None)
    assert_failed(output, words if "KILL" in fault else "HDPISSA_FAULT at")


def assert_failed(output, words):
    state = read_json(output / "run_state.json")
    assert state["state"] == "failed"
    assert words.format(host=host()) in state["message"], state
    rows = len(read_metrics(output)[0]) if (output / "metrics.jsonl").exists() else 0
    assert state["step"] in (rows, rows + ("at single_rank.metrics" in state["message"]))


@pytest.mark.slow
def test_by_the_real_launcher(folder, inputs, monkeypatch):
    """deepspeed, three ranks. The rank that sleeps notices it itself, and ends with the others."""
    output, log = folder / "launched", folder / "launched.log"
    monkeypatch.setenv("HDPISSA_FAULT", "step.backward:1:3:SLEEP")
    run = arguments(inputs, output, hang_timeout=12)
    process = start(command("deepspeed", run, ranks=3), folder / "home", log)
    assert finish(process) == 1, log.read_text()
    seconds = time.monotonic() - last_row(output)
    lines = [line for line in log.read_text().splitlines() if "error: rank" in line]
    assert len(lines) == 3, log.read_text()
    assert all(f"rank 1 on {host()}" in line and "step 3" in line for line in lines)
    assert seconds < 20
    assert_failed(output, "rank 1 on {host} hangs in step 3, backward")
