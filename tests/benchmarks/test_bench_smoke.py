"""A small case of every benchmark that needs no GPU: its real `main`, on a tiny model.

`ranks.launch` starts forks here and not the deepspeed launcher, which costs half a minute each time; that the launcher
starts them is shown by test_throughput.py and, for all scripts, by `make bench`.
"""

from __future__ import annotations

import importlib
import json
import runpy

import pytest
import torch
from ranks import run_ranks
from tiny import tiny_llama

from hdpissa.benchmarks import suite
from hdpissa.benchmarks.common import apart, ranks, timing
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.sharding import zero3


def in_a_group(function, job: dict):
    """What a rank of `ranks.launch` does."""
    zero3.init_distributed()
    return function(**job)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs a script and returns its rows."""

    def forked(function, count: int, *, timeout: float = 0, threads: int = 1, **job):
        return json.loads(json.dumps(run_ranks(count, in_a_group, function, job)))

    def call(script: str, result: str, *arguments: object):
        module = importlib.import_module(f"hdpissa.benchmarks.{script}")
        module.main([*map(str, arguments), "--folder", str(tmp_path)])
        content = json.loads((tmp_path / f"{result}.json").read_text())
        assert (tmp_path / f"{result}.md").is_file()
        assert set(content["identity"]) <= {column for row in content["rows"] for column in row}
        assert content["environment"]["torch"] == torch.__version__
        assert content["headline"]
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
    words = ("--model", model, "--ranks", 2, "--r", 2, "--slices", 2)
    [row] = bench("startup.slice_cache_start", "slice_cache_start", *words)
    assert row["cache MB"] > 0
    assert row["second: slices s"] > 0
    assert row["second / first, slices s"] == row["second: slices s"] / row["first: slices s"]


def test_checkpoint(bench, model):
    """Every round has a sample of its own of each kind and way."""
    rows = bench("memory.checkpoint", "checkpoint", "--model", model, "--r", 2, "--slices", 2, "--rounds", 3)
    assert [row["kind"] for row in rows] == ["full", "small"]
    for row in rows:
        assert row["files MB"] > row["of them fixed factors MB"] > 0
        assert len(row["samples"]) == 3
        for name, values in row["samples"].items():
            assert len(set(values)) == 3
            assert row[name] == sorted(values)[1]
        pauses, wholes = row["samples"]["pause in background s"], row["samples"]["in all s"]
        assert all(0 < pause <= whole for pause, whole in zip(pauses, wholes, strict=True))


def test_load_memory(bench, model):
    rows = bench("memory.load_memory", "load_memory", "--model_folder", model, "--ranks", 2)
    assert [row["path"] for row in rows] == ["own rows", "rank 0 reads all"]
    assert all(0 < row["peak MB"] < row["bound MB"] for row in rows)


def test_export_memory(bench, tmp_path):
    wide = tiny_llama(hidden=128, intermediate_size=128)  # room for 8 slices of rank 8
    wide.to(torch.bfloat16).save_pretrained(tmp_path / "wide")
    rows = bench("memory.export_memory", "export_memory", "--model_folder", tmp_path / "wide")
    assert len(rows) == 12
    assert all(row["seconds"] > 0 for row in rows)


def test_svd_of_a_models_weights(bench, model):
    """Every target once, errors against LAPACK; more directions than a target has are refused."""
    rows = bench("startup.svd_methods", "svd_weights", "--model", model, "--ranks", 4)
    assert len({row["spectrum"] for row in rows}) == len(rows) == 14
    assert all(row["auto σ error"] <= 1e-12 for row in rows)
    with pytest.raises(ConfigError):
        bench("startup.svd_methods", "svd_weights", "--model", model, "--ranks", 99)


def test_svd_methods(bench):
    rows = bench("startup.svd_methods", "svd_methods", "--largest", 576, "--ranks", 32)
    assert [row["spectrum"] for row in rows] == ["flat", "decaying"]
    assert all(row[f"{name} residual"] <= 1e-4 for row in rows for name in ("gram", "randomized"))
    assert all(row["lowrank σ error"] > 1e-3 for row in rows)  # the control


# --- what they share ----------------------------------------------------------------------------------------------


def test_works_take_turns():
    """The order rotates, and the round before the first one is not counted."""
    order = []
    works = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    assert timing.in_turns(works, 2) == {"a": [6, 8], "b": [4, 9], "c": [5, 7]}
    assert "".join(order) == "abcbcacab"


def test_times_of_many_calls_become_few():
    assert timing.blocks([3.0, 1.0]) == [3.0, 1.0]
    assert timing.blocks([float(n) for n in range(40)]) == [n + 0.5 for n in range(0, 40, 2)]
    assert len(timing.blocks([1.0] * 4999)) == timing.BLOCKS


@pytest.mark.parametrize(
    ("script", "function"),
    [
        ("memory/checkpoint", "measure"),
        ("memory/load_memory", "load"),
        ("memory/export_memory", "from_the_run"),
        ("startup/slice_cache_start", "start"),
    ],
)
def test_ranks_find_the_function_of_a_script(script, function):
    """A file that is started by its path is `__main__`, which is another file on the ranks."""
    started = runpy.run_path(str(suite.HERE / f"{script}.py"), run_name="started")[function]
    assert started.__module__ == "started"
    module = ranks.module_of(started)
    assert module == f"hdpissa.benchmarks.{script.replace('/', '.')}"
    assert hasattr(importlib.import_module(module), function)


@pytest.mark.parametrize(("log", "code", "killed"), [("return code = -9", 247, True), ("return code = -91", 1, False)])
def test_why_a_run_ended(log, code, killed):
    """By the system, for memory, or with an exit code."""
    assert ("memory" in ranks.reason(log, code)) == killed


@pytest.mark.parametrize(("cuda", "hip", "way"), [("13.0", None, "spawn"), (None, "7.1", "spawn"), (None, None, None)])
def test_no_process_is_forked_where_torch_knows_gpus(monkeypatch, cuda, hip, way):
    """What the fork server imports asks whether there is a GPU, and CUDA cannot be used in a fork after that."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert apart.way_to_start().get_start_method() == (way or "forkserver")
    if cuda:
        loaded = "'hdpissa.engine.sharding.zero3' in __import__('sys').modules"
        assert apart.call(eval, loaded) is False


def test_a_script_that_fails_or_hangs_is_named(tmp_path, monkeypatch):
    """An earlier result of its is no result."""
    for name, text in {"bad": "raise SystemExit(3)", "slow": "import time; time.sleep(60)"}.items():
        (tmp_path / f"{name}.py").write_text(text)
        (tmp_path / f"{name}.json").write_text("{}")
    files = [suite.HERE / step.script for step in suite.STEPS]
    monkeypatch.setattr(suite, "HERE", tmp_path)
    monkeypatch.setattr(suite, "LIMIT", 1)
    for name, code in (("bad", 3), ("slow", 124)):
        assert f"exit code {code}" in suite.run(suite.Step(name, f"{name}.py"), tmp_path)[0]
        assert not (tmp_path / f"{name}.json").exists()
    assert all(file.is_file() for file in files)
