"""A small case of every benchmark that starts ranks of its own or times layers: its real `main`, on a tiny model.

`ranks.launch` starts forks here and not the deepspeed launcher, which costs half a minute each time; that the launcher
starts such scripts is shown by tests/test_throughput.py and, for all of them, by `make bench`.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny import tiny_llama

from hdpissa.benchmarks import ranks, suite, timing


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
        main_of(stem, [*map(str, arguments)])
        content = json.loads((tmp_path / f"{result}.json").read_text())
        assert (tmp_path / f"{result}.md").read_text().startswith(f"# {result}")
        return content["rows"]

    monkeypatch.setattr(ranks, "launch", forked)
    monkeypatch.setitem(timing.write.__kwdefaults__, "folder", tmp_path)
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
    rows = bench("checkpoint", "checkpoint", "--model", model, "--r", 2, "--slices", 2)
    assert [row["kind"] for row in rows] == ["full", "small"]
    assert all(0 < row["pause in background s"] <= row["in all s"] for row in rows)


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
    rows = bench("cpu_layers", "cpu_layers_fp32_1_layers", "--dtype", "fp32", "--layers", 1, "--rounds", 1)
    assert [row["variant"] for row in rows][:3] == ["frozen", "ours", "lora"]
    assert rows[0]["/ frozen, median of rounds"] == 1
    assert all(row["least s"] > 0 for row in rows)


def test_every_script_of_the_suite_has_a_case():
    """Here, or in a file of its own."""
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for step in suite.STEPS:
        stem = step.script.removesuffix(".py")
        assert any(f'"{text}"' in tests for text in (stem, step.script)) or f"import {stem}" in tests, stem
