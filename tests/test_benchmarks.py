"""The benchmarks that need a GPU, as far as they go without one: on tiny sizes, on the CPU."""

from __future__ import annotations

import ast
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

from hdpissa.benchmarks import aot_table, apart, gpu, linear_layers, memcheck_run, shapes, timing

BENCHMARKS = Path(gpu.__file__).parent
SCRIPTS = sorted(p.stem for p in BENCHMARKS.glob("bench_*.py"))
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")


def start(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


@without_gpu
@pytest.mark.parametrize("script", ["linear_layers.py", "gpu.py"])
def test_without_gpu_one_line_and_exit_code_2(script):
    done = start(script)
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_kernel_benchmarks_import_without_gpu(script):
    """Nothing of a GPU is touched before they ask for one."""
    importlib.import_module(f"hdpissa.benchmarks.{script}")


@pytest.mark.slow
def test_whole_step(tmp_path):
    """All variants take steps of a tiny model, the real engine among them."""
    done = start("whole_step.py", "--tiny", "--random_slices", "--folder", str(tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "whole_step_tiny.json").read_text())["rows"]
    assert [r["variant"] for r in rows] == ["frozen", "lora", "reference", "ours", "frozen (2)"]
    assert all(r["step s"] > 0 for r in rows)


def test_linear_layers():
    """Rows of a tiny decoder layer; every variant really runs forward and backward."""
    tiny = shapes.groups("tiny", 128, 192, 64)

    def clock(work):
        start = time.perf_counter()
        work()
        return [1e3 * (time.perf_counter() - start)]

    rows = linear_layers.measure_model(tiny, tokens=16, device=torch.device("cpu"), time=clock)
    layers = ["tiny q,k,v", "tiny o", "tiny gate,up", "tiny down", "tiny decoder layer"]
    assert [r["layer"] for r in rows if r["r"] == 16] == [*layers, "tiny q alone", "tiny k alone", "tiny gate alone"]
    assert all(r["ours ms"] > 0 and r["lora ms"] > 0 for r in rows)


def test_memcheck_launches_every_kernel():
    """None is forgotten, and all take their arguments."""
    assert set(memcheck_run.run(DEVICE)) == set(aot_table.kernel_stems())


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
        loaded = "'hdpissa.engine.zero3' in __import__('sys').modules"
        assert apart.call(eval, loaded) is False


# --- the script that runs them all -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "outcome"),
    [("print('fine')", "passed"), ("raise SystemExit(3)", "exit code 3"), ("import time; time.sleep(60)", "stopped")],
)
def test_a_command_and_how_it_ends(program, outcome, tmp_path):
    log = tmp_path / "log"
    assert gpu.run([sys.executable, "-c", program], 3, dict(os.environ), log).startswith(outcome)
    assert program in log.read_text()


def test_a_tool_that_is_not_there_is_named(tmp_path):
    assert (
        gpu.run(["no-such-tool", "x"], 3, dict(os.environ), tmp_path / "log") == "no-such-tool is not on this machine"
    )


def test_every_phase_has_commands():
    """And no script of theirs is missing."""
    for phase in gpu.PHASES:
        for command, limit in gpu.commands(phase):
            assert limit
            assert all((gpu.ROOT / part).is_file() for part in command if part.endswith(".py"))


def test_throughput_ends_a_run_before_it_is_ended_itself():
    for command, limit in gpu.commands("throughput"):
        assert 2 * int(command[command.index("--timeout") + 1]) < limit


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
    commands = [command for phase in gpu.PHASES for command, _ in gpu.commands(phase)]
    todo = [gpu.ROOT / part for command in commands for part in command if part.endswith(".py")]
    todo += [BENCHMARKS / "throughput_worker.py", BENCHMARKS / "method_zero3.py", gpu.ROOT / "tests/conftest.py"]
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
            if not files and first != "hdpissa" and first not in sys.stdlib_module_names:
                others.add(first)
    assert {"psutil", "yaml", "deepspeed"} <= others <= set(gpu.NEEDED)


def test_an_import_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(gpu, "IMPORTS", "import nowhere_to_be_found")
    assert gpu.broken(dict(os.environ)) == "imports fail: ModuleNotFoundError: No module named 'nowhere_to_be_found'"
    monkeypatch.setattr(gpu, "IMPORTS", "import json")
    assert gpu.broken(dict(os.environ)) == ""


def test_results_are_collected(tmp_path, monkeypatch):
    """Those of this run only, with the phases' outcome."""
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    timing.write("old", [{"a": 0}], ["a"], folder=tmp_path)
    for old in tmp_path.iterdir():
        os.utime(old, (0, 0))
    (tmp_path / "gpu.log").write_text("log")
    timing.write("new", [{"a": 1}], ["a"], folder=tmp_path)
    gpu.collect(tmp_path / "out", ["tests: pytest: passed (1 s)"], since=1.0)
    stored = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert list(stored["results"]) == ["new"]
    assert "tests: pytest: passed" in (tmp_path / "out" / "gpu.md").read_text()
    assert (tmp_path / "out" / "gpu.log").read_text() == "log"


def test_a_new_result_does_not_make_another_revision(tmp_path, monkeypatch):
    """Of code that has changed the revision says so; a script that writes after every run finds its own results."""
    for name in ("README.md", "benchmarks/timing.py", "benchmarks/results/x.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "benchmarks" / "timing.py"))
    clean = timing._revision()
    (tmp_path / "benchmarks" / "results" / "x.json").write_text("two")
    assert timing._revision() == clean
    (tmp_path / "README.md").write_text("two")
    assert timing._revision() == f"{clean}+"
