"""`make gpu` as far as it goes without a GPU: its phases in their dry form, and what a kill leaves of their rows."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hdpissa.benchmarks.gpu import gpu_cache, gpu_rows
from hdpissa.benchmarks.gpu import run as gpu

BENCHMARKS = gpu.ROOT / "benchmarks"
EVERY = (*gpu.PHASES, *gpu.BY_NAME)


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """gpu.py, with its rows in `folder`."""
    command = [sys.executable, str(BENCHMARKS / "gpu" / "run.py"), *arguments]
    log = (folder.parent / "log").open("w")
    return subprocess.Popen(command, env={**os.environ, "OUT": str(folder)}, stdout=log, stderr=log)


def rows_of(folder: Path, phase: str) -> list[dict]:
    return [row for row in gpu_rows.read(folder) if row["phase"] == phase]


def test_phases_write_their_rows(tmp_path):
    """On the CPU; a second run of a phase replaces its rows and leaves those of others."""
    folder = tmp_path / "out"
    for phases in (("svd", "memcheck"), ("svd",)):
        assert start(folder, "--dry", *phases).wait(120) == 0, (tmp_path / "log").read_text()
        assert [row["cols"] for row in rows_of(folder, "svd")] == [64, 64, 96]
        assert {row["outcome"] for row in rows_of(folder, "memcheck")} == {"ended"}
        assert [row["name"] for row in rows_of(folder, "phases")] == list(phases)
    assert max(row["gram residual"] for row in rows_of(folder, "svd")) < 1e-4
    assert len(list(folder.iterdir())) <= 8
    assert "## svd" in (folder / "gpu.md").read_text()


def test_a_kill_leaves_the_rows(tmp_path):
    """SIGKILL to the whole session, once the second phase has a row."""
    folder = tmp_path / "out"
    process = start(folder, "--dry", "svd", "memcheck")
    end = time.monotonic() + 120
    while not rows_of(folder, "memcheck"):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(rows_of(folder, "svd")) == 3
    assert not (folder / "gpu.md").exists()
    done = subprocess.run([sys.executable, str(BENCHMARKS / "gpu" / "gpu_rows.py"), str(folder)], check=True)
    assert done.returncode == 0
    assert (folder / "gpu.md").read_text().startswith("## svd")


@pytest.mark.slow
def test_every_phase_runs_dry(tmp_path):
    """Those by name, too."""
    folder = tmp_path / "out"
    assert start(folder, "--dry", *(phase.name for phase in EVERY)).wait(900) == 0, (tmp_path / "log").read_text()
    assert all(rows_of(folder, phase.name) for phase in EVERY)
    assert {row["outcome"] for row in rows_of(folder, "phases")} == {"passed"}
    assert not [row for row in gpu_rows.read(folder) if "failed" in row]


# --- a phase, and how it ends -----------------------------------------------------------------------------------------


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Runs phases that are one-line programs."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    made = gpu.Runner(tmp_path, {**os.environ}, dry=False)

    def run(program: str, **how) -> str:
        (tmp_path / "benchmarks" / "x.py").write_text(program)
        return made.run(gpu.Phase("x", ("x.py",), **{"limit": 60, **how}))

    return run


def test_how_a_phase_ends(runner, tmp_path):
    """Each has its row; the output of all is in the log."""
    assert runner("print('said')") == "passed"
    assert runner("raise SystemExit(3)") == "exit code 3"
    assert runner("import time; time.sleep(60)", limit=1).startswith("stopped")
    assert runner("", under=("no-such-tool",)).startswith("no-such-tool")
    assert [row["outcome"] == "passed" for row in rows_of(tmp_path, "phases")] == [True, False, False, False]
    assert "said" in (tmp_path / "gpu.log").read_text()


def test_limits_leave_time_for_the_next_phases():
    """All phases at their limits are within what a machine is lent for."""
    assert sum(phase.limit for phase in gpu.PHASES) <= 800
    assert len({phase.name for phase in EVERY}) == len(EVERY)


def test_an_unknown_phase_is_refused():
    with pytest.raises(SystemExit) as ended:
        gpu.main(["nonsense"])
    assert ended.value.code == 2


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_failure_is_a_row_and_the_others_come(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(gpu_rows.FILE_VARIABLE, str(tmp_path / gpu_rows.FILE))
    monkeypatch.setenv(gpu_rows.PHASE_VARIABLE, "p")
    measured = ({"case": n, **gpu_rows.attempt({}, lambda n=n: {"value": 1 / n})} for n in (1, 0, 2))
    assert gpu_rows.record_all(measured) == 1
    rows = gpu_rows.read(tmp_path)
    assert [row.get("value") for row in rows] == [1.0, None, 0.5]
    assert rows[1]["failed"].startswith("ZeroDivisionError")
    assert {row["phase"] for row in rows} == {"p"}


def test_a_cut_last_line_is_left_out(tmp_path):
    (tmp_path / gpu_rows.FILE).write_text('{"phase": "a", "x": 1}\n{"phase": "a", "x"')
    assert gpu_rows.read(tmp_path) == [{"phase": "a", "x": 1}]


def test_tables():
    """One for each `table` of a phase, with all columns of its rows; of the tests only what did not pass, and a few."""
    tests = [{"phase": "tests", "test": f"t{n}", "outcome": "passed", "seconds": float(n)} for n in range(30)]
    tests.append({"phase": "tests", "test": "bad", "outcome": "failed", "seconds": 0.0, "failed": "a | b"})
    rows = [{"phase": "k", "table": "one", "a": 1.23456}, *tests, {"phase": "k", "table": "one", "b": 2}]
    text = gpu_rows.markdown(rows)
    assert "| a | b |" in text
    assert "| 1.235 |  |" in text
    assert "30 passed, 1 failed" in text
    assert text.count("| t") == 1 + gpu_rows.SLOWEST  # with the header
    assert "| bad | failed |" in text


# --- what a bare machine is given -------------------------------------------------------------------------------------


def test_a_cache_is_found_where_it_is_moved_to(tmp_path):
    """Triton's files name each other by absolute paths; those that were not carried are no longer named by old ones."""
    entry = tmp_path / "made" / "KEY"
    entry.mkdir(parents=True)
    (entry / "k.cubin").write_bytes(b"code")
    (entry / "__grp__k.json").write_text(json.dumps({"child_paths": {"k.cubin": str(entry / "k.cubin")}}))
    gpu.unpack_cache(gpu_cache.pack(tmp_path / "made"), tmp_path / "there")
    shutil.rmtree(tmp_path / "made")
    named = json.loads((tmp_path / "there" / "KEY" / "__grp__k.json").read_text())["child_paths"]
    assert Path(named["k.cubin"]).read_bytes() == b"code"


CACHED = """
import sys
from pathlib import Path
import torch
from hdpissa.benchmarks.gpu import gpu_cache
from hdpissa.benchmarks.kernel_timing.launch_capture import capture
from hdpissa.kernels import api
folder, found = Path(sys.argv[1]), []
for digit in "aab":
    with gpu_cache.keys_of(digit * 64), capture():
        m, v, grad = torch.zeros(3, 64)
        api.slice_adam_(m, v, grad, step=1, lr=0.1, betas=(0.9, 0.999), eps=1e-8)
    gpu_cache.prune(folder)
    found.append(len(list(folder.glob("*/*.cubin"))))
print(found)
"""


def test_keys_are_those_of_the_other_library(tmp_path):
    """With the same digest a kernel is found again, with another one not; only what a launch reads is kept."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", CACHED, str(tmp_path)]
    done = subprocess.run(command, env=env, check=True, timeout=200, stdout=subprocess.PIPE, text=True)
    assert done.stdout.splitlines()[-1] == "[1, 1, 2]"
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == set(gpu_cache.WANTED)


def imported(file: Path) -> set[str]:
    """What a file of the package or of the tests imports when it is imported, with full names."""
    found, todo = set(), list(ast.parse(file.read_text()).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ("hdpissa", *file.relative_to(gpu.ROOT).parts[:-1])
            base = ".".join([*(package[: len(package) - node.level + 1] if node.level else ()), node.module or ""])
            found |= {base.strip("."), *(f"{base}.{name.name}".replace("..", ".") for name in node.names)}
        elif not isinstance(node, ast.FunctionDef) and "TYPE_CHECKING" not in ast.unparse(getattr(node, "test", node)):
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


def test_all_that_the_phases_import_is_asked_for():
    """Else a machine that lacks it is found out by the first script, after minutes."""
    todo = [BENCHMARKS / phase.command[0] for phase in EVERY]
    todo += [
        BENCHMARKS / "step/throughput_worker.py",
        BENCHMARKS / "step/method_zero3.py",
        gpu.ROOT / "tests/conftest.py",
    ]
    seen, others = set(), set()
    while todo:
        file = todo.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in imported(file):
            first, *rest = name.split(".")
            inside = gpu.ROOT.joinpath(*rest) if first == "hdpissa" else gpu.ROOT / "tests" / first
            files = [path for path in (inside.with_suffix(".py"), inside / "__init__.py") if path.is_file()]
            todo += files
            if not files and first not in ("hdpissa", "gpu_rows") and first not in sys.stdlib_module_names:
                others.add(first)
    assert {"psutil", "yaml", "deepspeed"} <= others <= set(gpu.NEEDED)
