"""Throughput and projection scripts: their arithmetic, their refusals, one small run of each through the launcher."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from ranks import run_ranks

from hdpissa.benchmarks.step import plan_counted, throughput, throughput_table, throughput_work, throughput_worker
from hdpissa.benchmarks.step.methods import Setting
from hdpissa.launch.common.metrics import PEAK_FLOPS

BENCHMARKS = os.path.dirname(throughput.__file__)
TINY_WEIGHTS = 3 * 82944 + 512 * 96  # seven Linears of three layers, and the head


def start(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, os.path.join(BENCHMARKS, script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


# --- the work -------------------------------------------------------------------------------------------------------


def test_rows_are_the_same_for_all_and_padded():
    setting = Setting("tiny", micro_batch=3, accumulation=2)
    work, again = (throughput_work.work(setting, max_length=40, vocabulary=512, rank=0) for _ in range(2))
    other = throughput_work.work(setting, max_length=40, vocabulary=512, rank=1)
    assert work.lengths == again.lengths == other.lengths  # else scaling would measure the longest rows
    assert all(10 <= n <= 40 for n in work.lengths)
    real = sum(int(batch["attention_mask"].sum()) for batch in work.batches)
    assert work.real == real == sum(int((batch["labels"] != -100).sum()) for batch in work.batches)
    assert work.padded == sum(3 * max(work.lengths[3 * n : 3 * n + 3]) for n in range(2)) > real


def test_flops_by_hand():
    """4 N or 6 N per token, and causal attention: 96 wide in three layers."""
    cost, lengths = throughput_work.model_work("tiny", None), [27, 32]
    attention = 6 * (27**2 + 32**2) * 96 * 3
    assert throughput_work.useful_flops(cost, "hd_pissa", lengths) == 4 * TINY_WEIGHTS * 59 + attention
    assert throughput_work.useful_flops(cost, "full", lengths) == 6 * TINY_WEIGHTS * 59 + attention


# --- the table ------------------------------------------------------------------------------------------------------


def a_record(seconds: list[float], *, cpu: float = 1.0, device: str = "cpu", lengths: tuple = (10, 30)) -> dict:
    """What two ranks would have recorded; the second is slower by 10 %, and has half the CPU time."""

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

    return {"ranks": [rank(1.0, 1.0, lengths[0]), rank(1.1, 0.5, lengths[1])]}


A_RECORD = a_record([1.0])


def a_run(seconds: list[float], **how: Any) -> dict:
    return throughput_table.merge(a_record(seconds, **how))


def test_ranks_become_one():
    merged = a_run([1.0, 2.0])
    assert merged["step_s"] == [1.1, 2.2]
    assert merged["cpu_s"] == [1.5, 1.5]
    assert merged["lengths"] == [10, 30]
    assert merged["padded_tokens"] == 60


def test_row_by_hand():
    cost = throughput_work.model_work("tiny", None)
    row = throughput_table.row("hd_pissa", 2, [a_run([1.0, 2.0, 3.0], device="NVIDIA H100 80GB HBM3")], cost)
    assert row["step s p50"] == pytest.approx(2.2)
    assert row["step s p90"] == pytest.approx(1.1 * 2.8)
    assert row["tokens/s"] == pytest.approx(40 / 2.2)
    assert row["tokens/s/device"] == pytest.approx(20 / 2.2)
    assert row["padded tokens/s"] == pytest.approx(60 / 2.2)
    flops = throughput_work.useful_flops(cost, "hd_pissa", [10, 30])
    assert row["MFU"] == pytest.approx(flops / (2.2 * 2 * PEAK_FLOPS["H100"]))
    assert row["peak MB"] == pytest.approx(1.1)
    assert [row[f"{phase} %"] for phase in throughput_table.PHASES] == [25.0, 50.0, 12.5, 12.5]


def test_ratios_are_taken_within_a_round():
    """The second round's machine was ten times slower for all: ratios do not see it."""
    frozen, ours, theirs = ([a_run([s]), a_run([10 * s])] for s in (1.0, 1.2, 6.0))
    runs = {(2, "frozen"): frozen, (2, "hd_pissa"): ours, (2, "reference"): theirs, (4, "frozen"): [a_run([2.0])]}
    rows = throughput_table.table(runs, {(4, "full"): "no memory"}, throughput_work.model_work("tiny", None))
    found = {(row["ranks"], row["method"]): row for row in rows}
    assert found[2, "hd_pissa"]["/ frozen"] == pytest.approx(1.2)
    assert found[2, "hd_pissa"]["reference / it"] == pytest.approx(5.0)
    assert found[2, "hd_pissa"]["CPU reference / it"] == pytest.approx(1.0)
    assert found[2, "hd_pissa"]["efficiency"] == 1
    slower = found[4, "frozen"]["tokens/s/device"] / found[2, "frozen"]["tokens/s/device"]
    assert found[4, "frozen"]["efficiency"] == pytest.approx(slower)
    assert found[4, "full"] == {"method": "full", "ranks": 4, "remark": "no memory"}


def test_ratios_of_every_round_are_kept():
    runs = {(1, "frozen"): [a_run([1.0]), a_run([1.0])], (1, "hd_pissa"): [a_run([1.2]), a_run([1.6])]}
    row = throughput_table.table(runs, {}, throughput_work.model_work("tiny", None))[1]
    assert row["samples"]["/ frozen"] == pytest.approx([1.2, 1.6])
    assert row["/ frozen"] == pytest.approx(1.4)


def test_a_method_that_fails_later_keeps_its_rounds():
    runs = {(1, "frozen"): [a_run([1.0]), a_run([1.0])], (1, "full"): [a_run([2.0])]}
    rows = throughput_table.table(runs, {(1, "full"): "no memory"}, throughput_work.model_work("tiny", None))
    assert len(rows) == 2
    assert rows[1]["/ frozen"] == pytest.approx(2.0)
    assert rows[1]["remark"] == "then failed, after 1 round(s): no memory"
    assert [row["rounds"] for row in rows] == [2, 1]


@pytest.mark.parametrize(
    ("why", "code"), [("OutOfMemoryError: CUDA out of memory.", 0), ("exit code 1", 1), ("not done after 5 s", 1)]
)
def test_only_memory_may_fail(monkeypatch, tmp_path, why, code):
    """A model that does not fit has its row; anything else is an error."""
    monkeypatch.setattr(throughput, "run", lambda *_: why)
    assert throughput.main(["--methods", "full", "--folder", str(tmp_path)]) == code
    [row] = json.loads((tmp_path / "throughput_tiny_fp32.json").read_text())["rows"]
    assert row["remark"] == why


def test_every_run_is_written_before_anything_is_drawn(tmp_path, monkeypatch, capsys):
    """What is stopped, or cannot draw, leaves its figures: after each method those of all methods so far."""
    there = []
    file = tmp_path / "throughput_tiny_fp32.json"

    def run(method, *_):
        there.append(len(json.loads(file.read_text())["rows"]) if file.exists() else 0)
        return A_RECORD

    def draw(*_):
        raise ModuleNotFoundError("No module named 'matplotlib'")

    monkeypatch.setattr(throughput, "run", run)
    monkeypatch.setattr(throughput_table, "draw", draw)
    words = ["--methods", "hd_pissa", "lora", "frozen", "--folder", str(tmp_path)]
    assert throughput.main(words) == 0
    assert there == [0, 1, 2]
    said = capsys.readouterr()
    assert "no picture: ModuleNotFoundError" in said.err
    assert "| frozen | 2 | 1 |" in said.out
    assert len(json.loads(file.read_text())["rows"]) == 3


def test_percentiles():
    assert throughput_table.percentile([3.0], 90) == 3.0
    assert throughput_table.percentile([0.0, 10.0], 90) == pytest.approx(9.0)


def test_everyone_is_first_once():
    assert throughput.turns(["a", "b", "c"], 4) == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


@pytest.mark.parametrize(
    ("log", "code", "word"),
    [
        ("Process 7 exits with return code = -9", 247, "memory"),
        ("return code = -91", 1, "exit code 1"),
        ("", -9, "memory"),
    ],
)
def test_why_a_run_ended(log, code, word):
    assert word in throughput.reason(log, code)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--methods", "lorra"], "--methods lorra"),
        (["--num_accelerators", "0"], "--num_accelerators 0"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--layers", "9"], "--layers 9"),
        (["--dtype", "fp16"], "--dtype fp16"),
        (["--steps", "0"], "--steps 0"),
        (["--step", "2"], "--step"),
        (["--steps", "two"], "two"),
    ],
)
def test_bad_input_is_one_line(words, named, capsys, tmp_path):
    assert throughput.main([*words, "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert named in error[0]


def test_more_processes_than_a_target_has_slices_for_are_refused():
    with pytest.raises(plan_counted.ConfigError):
        plan_counted.parse(["--num_accelerators", "16"])


# --- real runs ------------------------------------------------------------------------------------------------------


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
    assert "throughput_tiny_fp32_phases.png" in (tmp_path / "throughput_tiny_fp32.md").read_text()
    assert [path.name for path in tmp_path.glob("*.png")] == ["throughput_tiny_fp32_phases.png"]
    pictures = throughput_table.draw([row, {**row, "ranks": 2}], tmp_path, "two")  # several counts can be compared
    assert pictures == ["two_scaling.png", "two_phases.png"]
    assert all((tmp_path / picture).stat().st_size > 1000 for picture in pictures)


@pytest.mark.slow
def test_a_run_that_fails_says_why():
    """Through the launcher; what becomes the method's row."""
    job = {"setting": {"model": "tiny", "r": 4, "slices": 2}, "max_length": 16, "steps": 1, "warmup": 0}
    assert "gradient_accumulation_steps is 1 with 2 slices per rank" in throughput.run("reference", 1, job, 600)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kept", [0, 10**12])
def test_the_plan_is_what_is_counted(ranks, kept):
    """Bytes and FLOP of a real step are the plan's, to the last; also where all weights stay gathered."""
    setting = dataclasses.replace(plan_counted.SETTING, zero={"stage3_param_persistence_threshold": kept})
    job = {"setting": dataclasses.asdict(setting), "max_length": plan_counted.LENGTH, "steps": 1}
    job |= {"warmup": plan_counted.WARMUP, "count_flops": True, "method": "hd_pissa"}
    found = run_ranks(ranks, throughput_worker.measure, job)[0]
    rows = plan_counted.compare(found, plan_counted.planned_run(setting, ranks), setting)
    assert len(rows) == 6
    assert [row["what"] for row in rows if not row["agrees"]] == []
    assert {row["what"] for row in rows if row["beside the plan"]} == {"FLOP of attention"}


@pytest.mark.slow
def test_the_script_counts(tmp_path):
    """By the launcher, at every number of processes."""
    done = start("plan_counted.py", "--folder", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "plan_counted.json").read_text())["rows"]
    assert len(rows) == 18
    assert all(row["agrees"] and (row["counted"] > 0 or row["ranks"] == 1) for row in rows)
