"""What a GPU would object to or wait for in a step, on a device in Python: see toy_device.py."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="devices in Python come with torch 2.13",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "found.json"
    command = [sys.executable, str(Path(__file__).with_name("toy_runs.py")), str(out)]
    interpreted = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=interpreted, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("exchange", ["factor", "dense"])
def test_numbers_are_the_cpus(found, exchange):
    cpu, toy = found["cpu"][exchange], found["toy"][exchange]
    assert toy["losses"] == pytest.approx(cpu["losses"], rel=1e-6)
    changed, off = math.hypot(*cpu["change"]), math.dist(toy["change"], cpu["change"])
    assert off < 1e-5 * changed


@pytest.mark.parametrize("exchange", ["factor", "dense"])
def test_one_wait_per_step(found, exchange):
    """The vote is read on the host; nothing else is, and no micro-batch waits for anything of ours."""
    toy = found["toy"][exchange]
    assert toy["micro"] == [[]] * len(toy["micro"])
    assert toy["steps"] == [["tolist"]] * len(toy["steps"])


def test_launchers_wait_for_nothing(found):
    launchers = found["launchers"]
    assert launchers["launches"] > 0
    assert launchers["micro"] == [[]] * len(launchers["micro"])
    assert launchers["steps"] == [["tolist"]] * len(launchers["steps"])


def test_planted_errors_are_seen(found):
    """A value read on the host in every layer's backward pass; a gradient on the CPU."""
    assert all(len(waited) > 0 for waited in found["item"]["micro"])
    assert found["mixed"] == {"error": "DeviceMixError"}
