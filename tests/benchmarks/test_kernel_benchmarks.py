"""The scripts of `make gpu` that time kernels, layers and steps: their measuring code on tiny sizes, under Triton's
interpreter where there is no GPU, with a clock that the test sets; and two of their results can be compared."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path

import pytest
from tensors import DEVICE

from hdpissa.benchmarks import compare
from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.kernel_timing import linear_layers, shapes
from hdpissa.benchmarks.kernel_timing import thin_products as thin
from hdpissa.benchmarks.step import whole_step

SCRIPTS = sorted(p.stem for p in Path(thin.__file__).parent.glob("bench_*.py"))
SIZES = {
    "bench_delta_apply": ("SLICES", (1,)),
    "bench_shard_subtract": ("NUMEL", 300),
    "bench_slice_adam": ("SIZES", (300,)),
}
CLOCK = [1.0, 1.02, 0.98, 1.01, 0.99]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Runs a script's `main` twice on tiny sizes, the second time on a device of half the speed: both results."""
    written = timing.write
    for name, value in {
        "need_gpu": lambda: DEVICE,
        "copy_bandwidth": lambda: 1e12,
        "matmul_rate": lambda: 1e12,
    }.items():
        monkeypatch.setattr(timing, name, value)
    [tiny] = shapes.distinct([shapes.groups("tiny", 48, 64, 48)[2]])
    for name, value in (("LLAMA_2_7B", [tiny]), ("LLAMA_3_70B", [])):
        monkeypatch.setattr(shapes, name, value)
    monkeypatch.setattr(shapes, "LLAMA_2_7B_GROUPS", shapes.groups("tiny", 64, 96, 64)[:1])
    monkeypatch.setattr(shapes, "LLAMA_3_70B_GROUPS", shapes.groups("wide", 64, 96, 64)[1:2])
    for module, name, value in ((thin, "TOKENS", 32), (thin, "RANKS", (16,)), (linear_layers, "TOKENS", 16)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("sys.argv", ["script"])

    def call(script: str) -> list:
        module = importlib.import_module(f"hdpissa.benchmarks.kernel_timing.{script}")
        if script in SIZES:
            monkeypatch.setattr(module, *SIZES[script])
        for side, factor in (("old", 1.0), ("new", 2.0)):

            def clock(work, factor=factor):
                work()
                return [factor * value for value in CLOCK]

            monkeypatch.setattr(timing, "samples_ms", clock)
            monkeypatch.setattr(timing, "write", functools.partial(written, folder=tmp_path / side))
            module.main()
        return [tmp_path / side / f"{script}.json" for side in ("old", "new")]

    return call


def compared(paths, capsys) -> str:
    """What compare.py says of two results; nothing may be lost between them."""
    capsys.readouterr()
    assert compare.main([*map(str, paths), "--all"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("script", [*SCRIPTS, "linear_layers"])
def test_a_script_measures_and_its_results_can_be_compared(script, measured, capsys):
    paths = measured(script)
    content = json.loads(paths[0].read_text())
    assert content["rows"]
    for row in content["rows"]:
        timed = [column for column in row if column.endswith(" ms") or column == "ms"]
        assert "decoder layer" in row.get("layer", "") or set(timed) == set(row["samples"])  # that one is a sum
        assert all(row[column] > 0 for column in timed)
    keys = [tuple(row[column] for column in content["identity"]) for row in content["rows"]]
    assert len(set(keys)) == len(keys)
    assert "too few rounds" in compared(paths, capsys)


def test_a_whole_step_keeps_the_time_of_every_step(tmp_path, monkeypatch, capsys):
    """All variants but the engine's, which `test_whole_step` starts."""
    monkeypatch.setitem(whole_step.VARIANTS, "ours", whole_step.frozen)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(whole_step, "TINY", whole_step.replace(whole_step.TINY, steps=5))
    for side in ("old", "new"):
        monkeypatch.setattr("sys.argv", ["whole_step.py", "--tiny", "--folder", str(tmp_path / side)])
        assert whole_step.main() == 0
    paths = [tmp_path / side / "whole_step_tiny.json" for side in ("old", "new")]
    content = json.loads(paths[0].read_text())
    assert content["configuration"]["hidden"] == whole_step.TINY.hidden
    for row in content["rows"]:
        longer = row["tokens of a micro-batch"] == whole_step.TINY.longer
        assert len(set(row["samples"]["step s"])) == (whole_step.TINY.longer_steps if longer else 5)
    compared(paths, capsys)


def test_times_of_many_calls_become_few():
    assert timing.blocks([3.0, 1.0]) == [3.0, 1.0]
    assert timing.blocks([float(n) for n in range(40)]) == [n + 0.5 for n in range(0, 40, 2)]
    assert len(timing.blocks([1.0] * 4999)) == timing.BLOCKS
