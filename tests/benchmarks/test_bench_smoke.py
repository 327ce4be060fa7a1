"""A small case of every benchmark that starts ranks of its own or times layers: its real `main`, on a tiny model.

`ranks.launch` starts forks here and not the deepspeed launcher, which costs half a minute each time; that the launcher
starts such scripts is shown by tests/benchmarks/test_throughput.py and, for all of them, by `make bench`.
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

from hdpissa.benchmarks.common import ranks
from hdpissa.engine.errors import ConfigError


def main_of(stem: str, arguments: list[str]) -> None:
    """A benchmark's `main` with a command line; `stem` is its room and its name."""
    sys.argv = [stem, *arguments]
    importlib.import_module(f"hdpissa.benchmarks.{stem}").main()


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs a script and returns its rows."""

    def forked(script: str, count: int, *arguments: object):
        out = tmp_path / "out.json"
        run_ranks(
            count, main_of, ".".join(Path(script).with_suffix("").parts[-2:]), [*map(str, arguments), "--out", str(out)]
        )
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
    [row] = bench(
        "startup.slice_cache_start", "slice_cache_start", "--model", model, "--ranks", 2, "--r", 2, "--slices", 2
    )
    assert row["cache MB"] > 0
    assert row["second: slices s"] > 0
    assert row["second / first, slices s"] == row["second: slices s"] / row["first: slices s"]


def test_checkpoint(bench, model):
    """Every round has a sample of its own of each kind and way."""
    rows = bench("memory.checkpoint", "checkpoint", "--model", model, "--r", 2, "--slices", 2, "--rounds", 3)
    assert [row["kind"] for row in rows] == ["full", "small"]
    for row in rows:
        assert row["files MB"] > row["of them fixed factors MB"] > 0
        for name, values in row["samples"].items():
            assert len(set(values)) == 3
            assert row[name] == sorted(values)[1]
        pauses, wholes = row["samples"]["pause in background s"], row["samples"]["in all s"]
        assert all(0 < pause <= whole for pause, whole in zip(pauses, wholes, strict=True))


def test_cpu_rates(bench):
    rows = bench("step.cpu_rates", "cpu_rates", "--seconds", 0.01, "--weights", 600_000)
    assert [row["unit"] for row in rows] == ["GFLOP/s per process"] * 6 + ["MB/s received"] * 3
    for row in rows:
        (values,) = row["samples"].values()
        assert len(set(values)) == len(values) >= 3
        assert row["rate"] > 0
    assert [row["what"] for row in rows[6:]] == ["all-gather of 2 MB"] * 3


def test_load_memory(bench, model):
    rows = bench("startup.load_memory", "load_memory", "--model_folder", model, "--ranks", 2)
    assert [row["path"] for row in rows] == ["own rows", "rank 0 reads all"]
    assert all(0 < row["peak MB"] < row["bound MB"] for row in rows)


def test_export_memory(bench, tmp_path):
    wide = tiny_llama(hidden=128, intermediate_size=128)  # room for 8 slices of rank 8
    wide.to(torch.bfloat16).save_pretrained(tmp_path / "wide")
    rows = bench("memory.export_memory", "export_memory", "--model_folder", tmp_path / "wide")
    assert len(rows) == 12
    assert all(row["seconds"] > 0 for row in rows)


def test_init(bench, model, capsys):
    """Every target once, errors against LAPACK; more directions than a target has are refused."""
    rows = bench("startup.init", "init", "--model_name_or_path", model, "--r", 2, "--slices", 2)
    [every] = [row for row in rows if row.get("shape") == "all"]
    assert every["matrices"] == 14 == sum("matrix" in row for row in rows)
    assert every["σ error"] <= 1e-12
    assert every["slice angle"] <= 1e-6
    with pytest.raises(ConfigError):
        bench("startup.init", "init", "--model_name_or_path", model, "--r", 99)


def test_svd_methods(bench):
    rows = bench("startup.svd_methods", "svd_methods", "--largest", 576, "--ranks", 32)
    assert [row["spectrum"] for row in rows] == ["flat", "decaying"]
    assert all(row[f"{name} residual"] <= 1e-4 for row in rows for name in ("gram", "randomized"))
    assert all(row["lowrank σ error"] > 1e-3 for row in rows)  # the control


def test_cpu_layers(bench):
    """Every sample is measured: the optimizer step takes its turn in each round."""
    rows = bench("step.cpu_layers", "cpu_layers_fp32_1_layers_x", *_CPU_LAYERS, "--rounds", 2, "--label", "x")
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
