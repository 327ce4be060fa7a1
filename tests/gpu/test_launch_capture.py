"""Every kernel launch of a real optimizer step, compiled for an H100 on a machine without one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("capture_runs.py")
FIXED = {"adam", "sum_partials"}  # no products
SHIPPED = {"thin_product", "one_pass", "outer_product", "split_factors", "subtract_delta", *FIXED}
EVERY = {*SHIPPED, "product_and_thin", "write_delta", "subtract_shard"}
LONG = ("dense", "fused", "fp32", "odd", "r32", "r128", "7b")


def captured(folder: Path, *cases: str) -> dict:
    compiling = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), str(folder / "found.json"), *cases]
    done = subprocess.run(command, env=compiling, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return captured(tmp_path_factory.mktemp("capture"), "shipped")


def spilled(kernels: list[dict]) -> list[dict]:
    return [kernel for kernel in kernels if kernel["spilled"]]


def narrow_reads(kernel: dict) -> dict[str, int]:
    """Instructions that read less than 8 bytes per thread from global memory."""
    wide = re.compile(r"\.(64|128)\b")
    return {name: n for name, n in kernel["accesses"].items() if name.startswith("LDG") and not wide.search(name)}


def test_a_step_as_shipped(found):
    kernels = found["shipped"]
    assert {kernel["name"] for kernel in kernels} == SHIPPED
    assert not spilled(kernels)
    for kernel in kernels:
        if kernel["name"] in ("thin_product", "one_pass", "outer_product"):
            assert kernel["matrix"]
            assert not narrow_reads(kernel)
        assert bool(kernel["matrix"]) == (kernel["name"] not in {"split_factors", *FIXED})


def test_what_the_chip_would_refuse_is_seen(found):
    """The controls: too few registers, and a pipeline too deep for the shared memory."""
    assert [kernel["spilled"] >= 64 for kernel in found["spills"]] == [True]
    assert found["too much shared"] == "OutOfResources"


@pytest.mark.slow
def test_other_configurations(tmp_path):
    cases = captured(tmp_path, *LONG)
    kernels = [kernel for name in LONG for kernel in cases[name]]
    assert {kernel["name"] for kernel in kernels} == EVERY
    assert not spilled(kernels)
