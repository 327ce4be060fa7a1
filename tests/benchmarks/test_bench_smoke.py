"""A small case of every benchmark that starts ranks of its own or times layers: its real `main`, on a tiny model.

`ranks.launch` starts forks here and not the deepspeed launcher, which costs half a minute each time; that the launcher
starts such scripts is shown by tests/benchmarks/test_throughput.py and, for all of them, by `make bench`.
"""

from __future__ import annotations

import ast
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny import tiny_llama

from hdpissa.benchmarks import ranks, suite


def main_of(stem: str, arguments: list[str]) -> None:
    """A benchmark's `main` with a command line."""
    sys.argv = [stem, *arguments]
    importlib.import_module(f"hdpissa.benchmarks.{stem}").main()


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs a script and returns its rows."""

    def forked(script: str, count: int, *arguments: object):
        out = tmp_path / "out.json"
        run_ranks(count, main_of, Path(script).stem, [*map(str, arguments), "--out", str(out)])
        return json.loads(out.read_text())

    def call(stem: str, result: str, *arguments: object):
        monkeypatch.setattr(sys, "argv", sys.argv)
        main_of(stem, [*map(str, arguments), "--folder", str(tmp_path)])
        content = json.loads((tmp_path / f"{result}.json").read_text())
        assert (tmp_path / f"{result}.md").read_text().startswith(f"# {result}")
        assert content["identity"]
        assert content["configuration"]
        assert str(tmp_path.parent) not in json.dumps(content["configuration"])
        return content["rows"]

    monkeypatch.setattr(ranks, "launch", forked)
    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    return folder


def test_slice_cache_start(bench, model):
    [row] = bench("slice_cache_start", "slice_cache_start", "--model", model, "--ranks", 2, "--r", 2, "--slices", 2)
    assert row["cache MB"] > 0
    assert row["second: slices s"] > 0
    assert row["second / first, slices s"] == row["second: slices s"] / row["first: slices s"]


def test_checkpoint(bench, model):
    """Every round has a sample of its own of each kind and way."""
    rows = bench("checkpoint", "checkpoint", "--model", model, "--r", 2, "--slices", 2, "--rounds", 3)
    assert [row["kind"] for row in rows] == ["full", "small"]
    for row in rows:
        assert row["files MB"] > row["of them fixed factors MB"] > 0
        for name, values in row["samples"].items():
            assert len(set(values)) == 3
            assert row[name] == sorted(values)[1]
        pauses, wholes = row["samples"]["pause in background s"], row["samples"]["in all s"]
        assert all(0 < pause <= whole for pause, whole in zip(pauses, wholes, strict=True))


def test_cpu_rates(bench):
    rows = bench("cpu_rates", "cpu_rates", "--seconds", 0.01, "--weights", 600_000)
    assert [row["unit"] for row in rows] == ["GFLOP/s per process"] * 6 + ["MB/s received"] * 3
    for row in rows:
        (values,) = row["samples"].values()
        assert len(set(values)) == len(values) >= 3
        assert row["rate"] > 0
    assert [row["what"] for row in rows[6:]] == ["all-gather of 2 MB"] * 3


def test_load_memory(bench, model):
    rows = bench("load_memory", "load_memory", "--model_folder", model, "--ranks", 2)
    assert [row["path"] for row in rows] == ["own rows", "rank 0 reads all"]
    assert all(0 < row["peak MB"] < row["bound MB"] for row in rows)


def test_export_memory(bench, tmp_path):
    wide = tiny_llama(hidden=128, intermediate_size=128)  # room for 8 slices of rank 8
    wide.to(torch.bfloat16).save_pretrained(tmp_path / "wide")
    rows = bench("export_memory", "export_memory", "--model_folder", tmp_path / "wide")
    assert len(rows) == 12
    assert all(row["seconds"] > 0 for row in rows)


def test_svd_methods(bench):
    rows = bench("svd_methods", "svd_methods", "--largest", 576, "--ranks", 32)
    assert [row["spectrum"] for row in rows] == ["flat", "decaying"]
    assert all(row[f"{name} residual"] <= 1e-4 for row in rows for name in ("gram", "randomized"))
    assert all(row["lowrank σ error"] > 1e-3 for row in rows)  # the control


def test_cpu_layers(bench):
    """Every sample is measured: the optimizer step takes its turn in each round."""
    rows = bench("cpu_layers", "cpu_layers_fp32_1_layers_x", *_CPU_LAYERS, "--rounds", 2, "--label", "x")
    steps = [f"optimizer step of ours, S = {s}" for s in (1, 8)]
    assert [row["variant"] for row in rows] == ["frozen", "ours", "lora", *steps]
    assert rows[0]["/ frozen, median of rounds"] == 1
    base = rows[0]["samples"]["median s"]
    for row in rows:
        seconds, ratios = row["samples"]["median s"], row["samples"]["/ frozen, median of rounds"]
        assert len(set(seconds)) == 2
        assert row["least s"] == min(seconds) > 0
        assert ratios == [a / b for a, b in zip(seconds, base, strict=True)]
        assert row["range of rounds"] == f"{min(ratios):.3g} … {max(ratios):.3g}"


_CPU_LAYERS = ("--dtype", "fp32", "--layers", 1)


# Script → the test that runs its `main` and looks at what it found. Those that are slow alone are named.
CASES = {
    "aot_table": "test_kernel_aot.py::compiled",
    "cpu_rates": "test_bench_smoke.py::test_cpu_rates",
    "cpu_layers": "test_bench_smoke.py::test_cpu_layers",
    "init": "test_suite.py::test_init",
    "svd_methods": "test_bench_smoke.py::test_svd_methods",
    "slice_cache_start": "test_bench_smoke.py::test_slice_cache_start",
    "load_memory": "test_bench_smoke.py::test_load_memory",
    "export_memory": "test_bench_smoke.py::test_export_memory",
    "checkpoint": "test_bench_smoke.py::test_checkpoint",
    "throughput": "test_throughput.py::test_a_run_through_the_launcher",
    "projection": "test_throughput.py::test_the_script_counts_and_draws",
    "update_rank": "test_update_rank.py::test_measured_ranks_reach_their_bounds",
}
SLOW_ALONE = {"projection"}  # what it counts and compares is in test_the_plan_is_what_is_counted


def case_of(script: str) -> ast.FunctionDef:
    """The test (or the fixture that measures for several tests) that runs a script."""
    file, name = CASES[script].split("::")
    (path,) = Path(__file__).parents[1].rglob(file)
    tree = ast.parse(path.read_text())
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)


@pytest.mark.parametrize("script", [step.script.removesuffix(".py") for step in suite.STEPS])
def test_every_script_of_the_suite_has_a_case(script):
    """One that `make test` runs, and that runs the script and not something beside it."""
    case = case_of(script)
    marks = [ast.unparse(decorator) for decorator in case.decorator_list]
    assert any(mark.startswith("pytest.mark.slow") for mark in marks) == (script in SLOW_ALONE)
    text = ast.unparse(ast.Module(case.body, []))
    names = (f"'{script}'", f"'{script}.py'", f"{script}.main(", "SCRIPT")
    assert any(name in text for name in names), f"{CASES[script]} does not run {script}"
