"""Throughput and the plan's check: their arithmetic, their refusals, a small run of each."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from ranks import run_ranks

from hdpissa.benchmarks import suite
from hdpissa.benchmarks.common import ranks, timing
from hdpissa.benchmarks.step import plan_counted, throughput, throughput_table, throughput_worker
from hdpissa.benchmarks.step.methods import Setting
from hdpissa.engine.errors import ConfigError
from hdpissa.launch.common.metrics import PEAK_FLOPS

TINY_WEIGHTS = 3 * 82944 + 512 * 96  # seven Linears of three layers, and the head
COST = throughput_table.model_work("tiny", None)


def start(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(suite.HERE / "step" / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


# --- the work -------------------------------------------------------------------------------------------------------


def test_rows_are_the_same_for_all_and_padded():
    setting, how = Setting("tiny", micro_batch=3, accumulation=2), {"max_length": 40, "vocabulary": 512}
    rows, again, other = (throughput_worker.make_rows(setting, rank=rank, **how) for rank in (0, 0, 1))
    assert rows.lengths == again.lengths == other.lengths  # else scaling would measure the longest rows
    assert all(10 <= n <= 40 for n in rows.lengths)
    assert all((a["labels"] == b["labels"]).all() for a, b in zip(rows.batches, again.batches, strict=True))
    real = sum(int(batch["attention_mask"].sum()) for batch in rows.batches)
    assert sum(rows.lengths) == real == sum(int((batch["labels"] != -100).sum()) for batch in rows.batches)
    assert rows.padded == sum(3 * max(rows.lengths[3 * n : 3 * n + 3]) for n in range(2)) > real


def test_flops_by_hand():
    """4 N or 6 N per token, and causal attention: 96 wide in three layers."""
    attention = 6 * (27**2 + 32**2) * 96 * 3
    assert throughput_table.useful_flops(COST, "hd_pissa", [27, 32]) == 4 * TINY_WEIGHTS * 59 + attention
    assert throughput_table.useful_flops(COST, "full", [27, 32]) == 6 * TINY_WEIGHTS * 59 + attention


# --- the table ------------------------------------------------------------------------------------------------------


def a_record(seconds: list[float], *, cpu: float = 1.0, device: str = "cpu", lengths: tuple = (10, 30)) -> list:
    """What two ranks would have found; the second is slower by 10 %, and has half the CPU time."""

    def rank(slower: float, share: float, length: int) -> dict:
        phases = {"forward": 1.0, "backward": 2.0, "exchange": 0.5, "apply": 0.5}
        figures = {"cpu_s": cpu * share, "sent": 7, "received": 9, "calls": 2, "phases": phases, "loss": 1.0}
        steps = [{"step_s": s * slower, **figures} for s in seconds]
        return {
            "steps": steps,
            "peak_bytes": int(1e6 * slower),
            "build_s": 1.0,
            "lengths": [length],
            "padded_tokens": 30,
            "exchange_bytes": None,
            "device": device,
        }

    return [rank(1.0, 1.0, lengths[0]), rank(1.1, 0.5, lengths[1])]


def a_run(seconds: list[float], **how: Any) -> dict:
    return throughput_table.merge(a_record(seconds, **how))


def test_ranks_become_one():
    merged = a_run([1.0, 2.0])
    assert merged["step_s"] == [1.1, 2.2]
    assert merged["cpu_s"] == [1.5, 1.5]
    assert merged["lengths"] == [10, 30]
    assert merged["padded_tokens"] == 60


def test_row_by_hand():
    row = throughput_table.row("hd_pissa", 2, [a_run([1.0, 2.0, 3.0], device="NVIDIA H100 80GB HBM3")], COST)
    assert row["step s p50"] == pytest.approx(2.2)
    assert row["step s p90"] == pytest.approx(1.1 * 2.8)
    assert row["tokens/s"] == pytest.approx(40 / 2.2)
    assert row["tokens/s/device"] == pytest.approx(20 / 2.2)
    assert row["padded tokens/s"] == pytest.approx(60 / 2.2)
    flops = throughput_table.useful_flops(COST, "hd_pissa", [10, 30])
    assert row["MFU"] == pytest.approx(flops / (2.2 * 2 * PEAK_FLOPS["H100"]))
    assert row["peak MB"] == pytest.approx(1.1)
    assert [row[f"{phase} %"] for phase in throughput_table.PHASES] == [25.0, 50.0, 12.5, 12.5]


def test_ratios_are_taken_within_a_round():
    """The second round's machine was ten times slower for all: ratios do not see it."""
    frozen, ours, theirs = ([a_run([s]), a_run([10 * s])] for s in (1.0, 1.2, 6.0))
    runs = {(2, "frozen"): frozen, (2, "hd_pissa"): ours, (2, "reference"): theirs, (4, "frozen"): [a_run([2.0])]}
    rows = throughput_table.table(runs, {(4, "full"): "no memory"}, COST)
    found = {(row["ranks"], row["method"]): row for row in rows}
    assert found[2, "hd_pissa"]["/ frozen"] == pytest.approx(1.2)
    assert found[2, "hd_pissa"]["reference / it"] == pytest.approx(5.0)
    assert found[2, "hd_pissa"]["samples"]["/ frozen"] == pytest.approx([1.2, 1.2])
    assert found[2, "hd_pissa"]["CPU reference / it"] == pytest.approx(1.0)
    assert found[2, "hd_pissa"]["efficiency"] == 1
    slower = found[4, "frozen"]["tokens/s/device"] / found[2, "frozen"]["tokens/s/device"]
    assert found[4, "frozen"]["efficiency"] == pytest.approx(slower)
    assert found[4, "full"] == {"method": "full", "ranks": 4, "remark": "no memory"}


def test_a_method_that_fails_later_keeps_its_rounds():
    runs = {(1, "frozen"): [a_run([1.0]), a_run([1.0])], (1, "full"): [a_run([2.0])]}
    rows = throughput_table.table(runs, {(1, "full"): "no memory"}, COST)
    assert len(rows) == 2
    assert rows[1]["/ frozen"] == pytest.approx(2.0)
    assert "no memory" in rows[1]["remark"]
    assert [row["rounds"] for row in rows] == [2, 1]


def test_everyone_is_first_once():
    assert throughput.turns(["a", "b", "c"], 4) == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("why", "code"), [("OutOfMemoryError: CUDA out of memory.", 0), ("exit code 1", 1)])
def test_every_run_is_written_and_only_memory_may_fail(monkeypatch, tmp_path, why, code):
    """What is stopped leaves its figures: after each method those of all so far."""
    there = []
    file = tmp_path / "throughput_tiny_fp32.json"

    def launch(function, count, *, method, **job):
        there.append(len(json.loads(file.read_text())["rows"]) if file.exists() else 0)
        if method == "full":
            raise ranks.FailedRunError(why)
        return a_record([1.0])

    monkeypatch.setattr(ranks, "launch", launch)
    assert throughput.main(["--methods", "hd_pissa", "full", "frozen", "--folder", str(tmp_path)]) == code
    assert there == [0, 1, 2]
    rows = {row["method"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["full"] == {"method": "full", "ranks": 2, "remark": why}
    assert rows["hd_pissa"]["/ frozen"] == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--methods", "lorra"],
        ["--num_accelerators", "0"],
        ["--model", "no/such/folder"],
        ["--layers", "9"],
        ["--dtype", "fp16"],
        ["--steps", "0"],
        ["--step", "2"],
        ["--zero", "stage3"],
    ],
)
def test_bad_input_is_one_line(words, capsys, tmp_path):
    assert timing.run(lambda: throughput.main([*words, "--folder", str(tmp_path)])) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words[0] in line or words[1] in line


def test_more_processes_than_a_target_has_slices_for_are_refused(tmp_path):
    with pytest.raises(ConfigError):
        plan_counted.main(["--num_accelerators", "16", "--folder", str(tmp_path)])


def test_a_run_through_the_launcher(tmp_path):
    words = ["--num_accelerators", 1, "--methods", "hd_pissa", "--steps", 2, "--warmup", 1, "--max_length", 16]
    done = start("throughput.py", *words, "--folder", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = json.loads((tmp_path / "throughput_tiny_fp32.json").read_text())["rows"]
    assert len(row["samples"]["step s p50"]) == len(row["samples"]["CPU s"]) == 2
    assert row["bytes sent"] == row["bytes sent by engine.exchange"] == 0
    assert 0 < row["real tokens"] <= row["padded tokens"]
    assert row["peak MB"] > 100
    assert sum(row[f"{phase} %"] for phase in throughput_table.PHASES) == pytest.approx(100)


@pytest.mark.slow
def test_a_run_that_fails_says_why(capfd):
    """Through the launcher; what becomes the method's row."""
    job = {"setting": {"model": "tiny", "r": 4, "slices": 2}, "max_length": 16, "steps": 1, "warmup": 0}
    with pytest.raises(ranks.FailedRunError, match="gradient_accumulation_steps"):
        ranks.launch(throughput_worker.measure, 1, method="reference", **job)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("kept", [0, 10**12])
def test_the_plan_is_what_is_counted(count, kept):
    """Bytes and FLOP of a real step are the plan's, to the last; also where all weights stay gathered."""
    setting = dataclasses.replace(plan_counted.SETTING, zero={"stage3_param_persistence_threshold": kept})
    found = run_ranks(count, throughput_worker.measure, **plan_counted.job_of(setting))[0]
    rows = plan_counted.compare(found, plan_counted.planned_run(setting, count), setting)
    assert len(rows) == 6
    assert [row["what"] for row in rows if not row["agrees"]] == []
    assert {row["what"] for row in rows if row["outside the plan"]} == {"FLOP of attention"}


@pytest.mark.slow
def test_the_script_counts(tmp_path):
    """By the launcher, at every number of processes."""
    done = start("plan_counted.py", "--folder", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "plan_counted.json").read_text())["rows"]
    assert len(rows) == 18
    assert all(row["agrees"] and (row["counted"] > 0 or row["ranks"] == 1) for row in rows)
