"""Every kernel, compiled ahead of time for three chips with the block sizes that are shipped; and the stem rule.

One subprocess compiles everything, without the interpreter that the other tests run kernels in.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from hdpissa.benchmarks.kernel_timing import aot_table, time_kernels
from hdpissa.kernels import reference

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "kernel_timing" / "aot_table.py"
CONTROL = ROOT / "tests" / "gpu" / "spilling_kernel.py"
STEMS = aot_table.kernel_stems()


@pytest.fixture(scope="module", params=["sample", pytest.param("all", marks=pytest.mark.slow)])
def compiled(tmp_path_factory, request):
    """Rows of the table: those of the kernels (two variants of each, or all), and those of the control."""
    folder = tmp_path_factory.mktemp("aot")
    quiet = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *STEMS, str(CONTROL), "--folder", str(folder)]
    command += ["--sample"] * (request.param == "sample")
    done = subprocess.run(
        command, env={**quiet, "TRITON_CACHE_DIR": str(folder / "cache")}, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((folder / "aot.json").read_text())
    rows = content["rows"]
    return [r for r in rows if r["module"] in STEMS], [r for r in rows if r["module"] == str(CONTROL)]


def offenders(rows, offends):
    return [f"{r['kernel']} on {r['target']}: {r}" for r in rows if offends(r)]


def test_every_kernel_is_compiled_for_every_chip(compiled):
    kernels, _ = compiled
    assert {(r["module"], r["target"]) for r in kernels} == {(s, t) for s in STEMS for t in aot_table.TARGETS}


def test_nothing_spills(compiled):
    kernels, _ = compiled
    assert not offenders(kernels, lambda row: row["spilled"])


def test_a_spill_would_be_seen(compiled):
    """The control: the same reader finds the spills of a kernel that is given too few registers."""
    _, control = compiled
    assert {r["target"] for r in control} == {"sm_90", "gfx942"}
    assert all(r["spilled"] >= 64 for r in control)


def test_shared_memory_is_within_the_chips(compiled):
    kernels, _ = compiled
    assert max(r["shared KiB"] for r in kernels) > 16, "shared memory is not being read"
    assert not offenders(kernels, lambda row: row["shared KiB"] > row["limit KiB"])


def test_tensor_cores_are_used_where_meant(compiled):
    kernels, _ = compiled
    assert not offenders(kernels, lambda row: row["tensor_core"] and not row["matrix instructions"])
    assert offenders(kernels, lambda row: not row["matrix instructions"]), "every kernel seems to have them"


@pytest.mark.parametrize("stem", STEMS)
def test_one_stem_four_places(stem):
    """A kernel, its torch version with the same arguments, its test, its benchmark."""
    name = stem if hasattr(reference, stem) else f"{stem}_"
    arguments = inspect.signature(getattr(reference, name)).parameters
    assert list(inspect.signature(getattr(import_module(f"hdpissa.kernels.{stem}"), name)).parameters) == list(
        arguments
    )
    assert (ROOT / "tests" / "kernel_tests" / f"test_kernel_{stem}.py").is_file()
    assert stem in time_kernels.KERNELS
