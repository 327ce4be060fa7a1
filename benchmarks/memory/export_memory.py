"""How much memory does an export need on top of what the run holds, and how much the one from a checkpoint?

    python benchmarks/memory/export_memory.py [--gigabytes 3] [--ranks 2] [--model_folder KEPT]

The model is load_memory.py's: a Llama of random bf16 weights. Its slices are random, too, and the run's change of W is
made up (running sums, applied to the weights), because no figure here depends on them. Measured are all exports of the
running engine, and those of launch/export.py from a checkpoint of each kind, by one process. The figure is the peak of
anonymous memory over what was there before the export, of the rank that needs most. The bound: one shard of one tensor
in fp32 (from a checkpoint the whole tensor), and 300 MB.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hdpissa.benchmarks.common import ranks, timing
from hdpissa.benchmarks.memory.load_memory import write_model
from hdpissa.benchmarks.memory.peak import Peak, anonymous_bytes
from hdpissa.engine.checkpoint.manifest import Kind
from hdpissa.engine.sharding.base_files import BaseFiles

ALLOWANCE_BYTES = 300e6
SLICES, R = 8, 8
KINDS: tuple[Kind, ...] = ("full", "small")
EXPORTS: tuple[dict[str, Any], ...] = (
    {"format": "hf", "dtype": "bf16"}, {"format": "hf", "dtype": "fp32"}, {"format": "peft"},
    {"format": "peft", "rank": 16},
)  # fmt: skip
COLUMNS = ("from", "export", "ranks", "peak MB", "bound MB", "seconds")


def measured(action: Callable[..., object], *args: Any, **options: Any) -> tuple[int, float]:
    """(bytes of the peak over what was there before, seconds)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # freed memory that the C library keeps would hide a peak
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, start = anonymous_bytes(), time.perf_counter()
    with Peak() as peak:
        action(*args, **options)
    return peak.bytes - before, time.perf_counter() - start


def row(source: str, options: dict[str, Any], found: list[tuple[int, float]], bound: float) -> dict[str, Any]:
    """A row of the table: megabytes of the rank that needs most, seconds of the slowest."""
    line = {"from": source, "export": " ".join(map(str, options.values())), "ranks": len(found)}
    line |= {"peak MB": max(peak for peak, _ in found) / 1e6, "bound MB": bound / 1e6}
    return line | {"of each rank MB": [peak / 1e6 for peak, _ in found], "seconds": max(took for _, took in found)}


def from_the_run(folder: str) -> list[dict[str, Any]]:
    """A rank's part: measures every export of a running engine, and saves its checkpoints."""
    from hdpissa.benchmarks.step import plain_engine
    from hdpissa.engine import initialize, load_pretrained
    from hdpissa.engine.sharding import zero3

    count = dist.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": max(1, SLICES // count),
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
        "hd_pissa": {"r": R, "slices": SLICES},
    }
    with plain_engine.random_slices():
        engine = initialize(model=load_pretrained(folder, config), config=config)
    engine.optimizer.store.delta_sum.normal_(std=1e-4)
    engine.optimizer.apply_sums()
    engine.optimizer.updates = 1
    bound = 4 * max(zero3.full_numel(p) for p in engine.module.parameters()) / count + ALLOWANCE_BYTES
    rows = []
    for number, options in enumerate(EXPORTS):
        target = Path(folder, f"export-{number}")
        found: list[Any] = [None] * count
        dist.all_gather_object(found, measured(engine.export, target, **options))
        rows.append(row("run", options, found, bound))
        if dist.get_rank() == 0:
            shutil.rmtree(target)
    for kind in KINDS:
        engine.save_checkpoint(Path(folder, f"checkpoints-{kind}"), kind=kind)
    return rows


def from_checkpoints(folder: Path) -> list[dict[str, Any]]:
    """Measures launch/export.py on both kinds; one process, one shard: the whole tensor."""
    from hdpissa.engine.export import from_checkpoint  # noqa: F401  (what the command imports is no peak)
    from hdpissa.launch import export

    with BaseFiles(str(folder)) as base:
        largest = max(torch.Size(base.slice(name).get_shape()).numel() for name in base.source)
    rows = []
    for kind in KINDS:
        for options in EXPORTS:
            argv = ["--checkpoint", str(folder / f"checkpoints-{kind}"), "--output_dir", str(folder / "export")]
            argv += [text for name, value in options.items() for text in (f"--{name}", str(value))]
            found = [measured(export.main, argv)]
            rows.append(row(f"{kind} checkpoint", options, found, 4 * largest + ALLOWANCE_BYTES))
            shutil.rmtree(folder / "export")
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = timing.Parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model_folder", help="where the model is kept; default: written anew, and removed")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(args.model_folder or own)
        write_model(folder, args.gigabytes)
        rows = [*ranks.launch(from_the_run, args.ranks, folder=str(folder))[0], *from_checkpoints(folder)]
        size = sum(path.stat().st_size for path in folder.glob("model*.safetensors")) / 1e9
    within = sum(line["peak MB"] <= line["bound MB"] for line in rows)
    worst = max(line["peak MB"] for line in rows)
    headline = f"{size:.1f} GB model: at most {worst:.0f} MB, {within} of {len(rows)} exports within their bound"
    identity = ("from", "export", "ranks")
    timing.write("export_memory", args, rows, COLUMNS, identity=identity, headline=headline, r=R, slices=SLICES)


if __name__ == "__main__":
    raise SystemExit(timing.run(main))
