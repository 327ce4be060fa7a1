"""The benchmarks that need a GPU, as far as they go without one: on tiny sizes, on the CPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensors import DEVICE

from hdpissa.benchmarks.common import apart, timing
from hdpissa.benchmarks.gpu import run as gpu
from hdpissa.benchmarks.kernel_timing import aot_table, linear_layers, memcheck_run, shapes

BENCHMARKS = Path(gpu.__file__).parents[1]
SCRIPTS = sorted(p.stem for p in BENCHMARKS.glob("kernel_timing/bench_*.py"))
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")


def start(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


@without_gpu
@pytest.mark.parametrize("script", ["kernel_timing/linear_layers.py", "gpu/run.py"])
def test_without_gpu_one_line_and_exit_code_2(script):
    done = start(script)
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_kernel_benchmarks_import_without_gpu(script):
    """Nothing of a GPU is touched before they ask for one."""
    importlib.import_module(f"hdpissa.benchmarks.kernel_timing.{script}")


@pytest.mark.slow
def test_whole_step(tmp_path):
    """All variants take steps of a tiny model, the real engine among them."""
    for arguments, name, variants in (
        ((), "whole_step_tiny", ["frozen", "frozen", "ours", "ours", "lora", "lora", "frozen (2)"]),
        (("--reference",), "whole_step_reference_tiny", ["ours", "reference"]),
    ):
        done = start("step/whole_step.py", "--tiny", *arguments, "--folder", str(tmp_path), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stdout + done.stderr
        rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        assert [r["variant"] for r in rows] == variants
        assert all(r["step s"] > 0 for r in rows)


def test_linear_layers():
    """Rows of a tiny decoder layer; every variant really runs forward and backward."""
    tiny = shapes.groups("tiny", 128, 192, 64)

    def clock(work):
        start = time.perf_counter()
        work()
        return [1e3 * (time.perf_counter() - start)]

    rows = list(linear_layers.measure_model(tiny, tokens=16, device=torch.device("cpu"), time=clock))
    layers = ["tiny q,k,v", "tiny o", "tiny gate,up", "tiny down", "tiny decoder layer"]
    assert [r["layer"] for r in rows if r["r"] == 16] == [*layers, "tiny q alone", "tiny k alone", "tiny gate alone"]
    assert all(r["ours ms"] > 0 and r["lora ms"] > 0 for r in rows)


def test_memcheck_launches_every_kernel():
    """None is forgotten, and all take their arguments."""
    rows = list(memcheck_run.rows(DEVICE))
    assert {row["outcome"] for row in rows} == {"ended"}
    assert {row["kernel"] for row in rows} == set(aot_table.kernel_stems())


def test_a_result_is_written_twice(tmp_path):
    path = timing.write("x", [{"a": 1.23456, "b": "c", "d": 1}], ["b", "a"], "A note.", folder=tmp_path)
    assert "| c | 1.235 |" in path.read_text()
    stored = json.loads((tmp_path / "x.json").read_text())
    assert stored["rows"] == [{"a": 1.23456, "b": "c", "d": 1}]
    assert stored["environment"]["torch"] == torch.__version__


# --- processes of their own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cuda", "hip", "way"), [("13.0", None, "spawn"), (None, "7.1", "spawn"), (None, None, None)])
def test_no_process_is_forked_where_torch_knows_gpus(monkeypatch, cuda, hip, way):
    """What the fork server imports asks whether there is a GPU, and CUDA cannot be used in a fork after that."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert apart.way_to_start().get_start_method() == (way or "forkserver")
    if cuda:
        loaded = "'hdpissa.engine.sharding.zero3' in __import__('sys').modules"
        assert apart.call(eval, loaded) is False


def test_a_new_result_does_not_make_another_revision(tmp_path, monkeypatch):
    """Of code that has changed the revision says so; a script that writes after every run finds its own results."""
    for name in ("README.md", "benchmarks/common/timing.py", "benchmarks/results/x.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "benchmarks" / "common" / "timing.py"))
    clean = timing._revision()
    (tmp_path / "benchmarks" / "results" / "x.json").write_text("two")
    assert timing._revision() == clean
    (tmp_path / "README.md").write_text("two")
    assert timing._revision() == f"{clean}+"
