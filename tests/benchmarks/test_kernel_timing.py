"""The scripts of `make gpu` that time kernels, layers and steps: their measuring code on tiny sizes, under Triton's
interpreter where there is no GPU; and two of their results can be compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensors import DEVICE

from hdpissa.benchmarks import compare, suite
from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.kernel_timing import aot_table, memcheck_run, time_kernels
from hdpissa.benchmarks.step import whole_step

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")


@without_gpu
@pytest.mark.parametrize("script", ["kernel_timing/time_kernels.py", "gpu/run.py"])
def test_without_gpu_one_line_and_exit_code_2(script):
    done = subprocess.run([sys.executable, str(suite.HERE / script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Runs a script's `main` twice, the second time on a device of half the speed; the rows of the first result."""
    for name, value in {"need_gpu": DEVICE, "copy_bandwidth": 1e12, "matmul_rate": 1e12}.items():
        monkeypatch.setattr(timing, name, lambda value=value: value)
    monkeypatch.setattr("hdpissa.benchmarks.gpu.gpu_rows.is_dry", lambda: True)

    def call(script, result: str) -> list[dict]:
        for side, factor in (("old", 1.0), ("new", 2.0)):

            def clock(work, factor=factor):
                work()
                return [factor * value for value in (1.0, 1.02, 0.98, 1.01, 0.99)]

            monkeypatch.setattr(timing, "samples_ms", clock)
            assert script.main(["--folder", str(tmp_path / side)]) == 0
        files = [tmp_path / side / f"{result}.json" for side in ("old", "new")]
        assert compare.main([*map(str, files), "--all"]) == 0  # nothing is lost from one to the other
        content = json.loads(files[0].read_text())
        keys = [tuple(row.get(column) for column in content["identity"]) for row in content["rows"]]
        assert len(set(keys)) == len(keys)
        return content["rows"]

    return call


def test_kernels(measured):
    """Every kernel, beside torch; the launches are those that a step makes."""
    rows = measured(time_kernels, "time_kernels")
    assert {row["kernel"] for row in rows} == set(time_kernels.KERNELS) == set(aot_table.kernel_stems())
    for row in rows:
        columns = [column for column in row if column.endswith(" ms")]
        assert set(columns) == set(row["samples"])
        assert all(row[column] == 1 for column in columns)
        if row["kernel"] != "fused_linear":
            assert row["torch / triton"] == 1
            assert row["% of copy bandwidth"] > 0
    errors = {row["precision"]: row["relative error of D"] for row in rows if row["kernel"] == "delta_apply"}
    assert errors["fp32"] < 1e-6 < errors["tf32"] < 1e-2


def test_whole_step(tmp_path):
    """All variants take steps of a tiny model, the real engine among them."""
    command = [sys.executable, str(Path(whole_step.__file__)), "--tiny", "--folder", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "whole_step_tiny.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["frozen", "frozen", "ours", "ours", "lora", "lora", "frozen (2)"]
    assert all(row["samples"]["step s"] == [row["step s"]] for row in rows)


def test_memcheck_launches_every_kernel():
    """None is forgotten, and all take their arguments."""
    rows = list(memcheck_run.rows(DEVICE))
    assert {row["outcome"] for row in rows} == {"ended"}
    assert {row["kernel"] for row in rows} == set(aot_table.kernel_stems())
