"""`make bench` and the scripts that start their own ranks: tiny models, real launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny import tiny_llama

from hdpissa.benchmarks import figure_words, suite

BENCHMARKS = suite.HERE


def start(script, folder, *arguments):
    environment = {**os.environ, "HDPISSA_RESULTS": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    return folder


def test_init(model, tmp_path):
    """Every target once, errors against LAPACK; what does not fit is one line."""
    done = start("init.py", tmp_path, "--model_name_or_path", model, "--r", 2, "--slices", 2)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "init.json").read_text())["rows"]
    every = figure_words.one(rows, shape="all")
    assert every["matrices"] == 14 == sum("matrix" in row for row in rows)
    assert every["σ error"] <= 1e-12
    assert every["slice angle"] <= 1e-6
    done = start("init.py", tmp_path / "other", "--model_name_or_path", model, "--r", 99)
    assert done.returncode == 2
    assert "--slices 8 × --r 99 exceeds the smaller side of" in done.stderr


def test_every_step_is_there():
    assert all((BENCHMARKS / step.script).is_file() for step in suite.STEPS)
    assert len({step.result for step in suite.STEPS}) == len(suite.STEPS)


def test_a_script_that_fails_is_named_and_the_others_run(tmp_path, monkeypatch, capsys):
    """One ends with an exit code, one runs over its limit, one leaves a result."""
    write = "import timing; timing.write('good', [{'a': 1}], ['a'], 'A note. More.', headline='all is well')"
    for name, text in {"bad": "raise SystemExit(3)", "slow": "import time; time.sleep(60)", "good": write}.items():
        (tmp_path / f"{name}.py").write_text(f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); {text}\n")
    steps = tuple(
        suite.Step(name, f"{name}.py", limit=limit, more=(f"{name}_more",), alone=name == "bad")
        for name, limit in (("bad", 60), ("slow", 1), ("good", 60))
    )
    monkeypatch.setattr(suite, "HERE", tmp_path)
    monkeypatch.setattr(suite, "STEPS", steps)
    stale = [tmp_path / "out" / name for name in ("bad.json", "bad.md", "bad_phases.png", "slow_more.json")]
    beside = tmp_path / "out" / "badly.json"
    (tmp_path / "out").mkdir()
    for file in (*stale, beside):
        file.write_text("{}")
    assert suite.main(["--folder", str(tmp_path / "out")]) == 1
    assert not any(file.exists() for file in stale)  # an earlier result of a script that fails is no result
    assert beside.exists()
    said = capsys.readouterr().out
    for words in ("exit code 3", "stopped after 1 s", "all is well", "s in all"):
        assert words in said
    assert suite.main(["nonsense", "--folder", str(tmp_path / "out")]) == 2
    assert "there are bad, slow, good" in capsys.readouterr().err


STOPPED = """
import os, signal, sys
from pathlib import Path
from hdpissa.benchmarks import suite
signal.signal(signal.SIGINT, signal.default_int_handler)  # who was started in a shell's background ignores it
suite.HERE = Path(sys.argv[1])
alone = sys.argv[2] == "alone"
steps = [suite.Step(name, "sleep.py", (name,), alone=alone) for name in ("one", "two")]
suite.Runner(suite.HERE, {**os.environ}).run_all(steps)
"""


@pytest.mark.parametrize(("how", "begun"), [("alone", ["one"]), ("together", ["one", "two"])])
def test_a_suite_that_is_stopped_leaves_nothing_running(tmp_path, how, begun):
    write = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(f'{os.getpid()}.'); time.sleep(60)"
    (tmp_path / "sleep.py").write_text(write)
    process = subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path), how], cwd=tmp_path)
    files, deadline = [tmp_path / name for name in begun], time.monotonic() + 60
    while not all(file.exists() and file.read_text().endswith(".") for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == "") == begun
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text().rstrip(".")), 0)
