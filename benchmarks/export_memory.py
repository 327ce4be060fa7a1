"""How much memory does an export need beside what the run holds anyway, and how much the one from a checkpoint?

    deepspeed --num_accelerators 2 benchmarks/export_memory.py --gigabytes 3 --folder /tmp/big            from the run
    python benchmarks/export_memory.py --folder /tmp/big --offline                                from its checkpoints

The model is load_memory.py's: a Llama of random bf16 weights, written once into --folder. Its slices are random, too,
and the run's change of W is made up (running sums, applied to the weights), because no figure here depends on them.
The first command also saves a checkpoint of each kind for the second. What is measured is the peak of anonymous memory
over what was there before the export, per rank. The bound: one shard of one tensor in fp32, and 300 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hdpissa.benchmarks.load_memory import Peak, anonymous_bytes, write_model
from hdpissa.engine.checkpoint_format import Kind

ALLOWANCE_BYTES = 300e6
SLICES, R, CUT = 8, 8, 16
KINDS: tuple[Kind, ...] = ("full", "small")


def exports() -> list[dict[str, Any]]:
    hf = [{"format": "hf", "dtype": dtype} for dtype in ("bf16", "fp32")]
    return [*hf, {"format": "peft"}, {"format": "peft", "rank": CUT}]


def measured(action: Callable[..., object], *args: Any, **options: Any) -> tuple[int, float]:
    """(bytes of the peak over what was there before, seconds)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # freed memory that the C library keeps would hide a peak
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, start = anonymous_bytes(), time.perf_counter()
    with Peak() as peak:
        said = action(*args, **options)
    if said is not None and int(os.environ.get("RANK", "0")) == 0:
        print(said)
    return peak.bytes - before, time.perf_counter() - start


def show(name: str, rows: list[tuple[int, float]], bound: float) -> None:
    peaks = ", ".join(f"{peak / 1e6:.0f}" for peak, _ in rows)
    word = "within" if max(peak for peak, _ in rows) <= bound else "ABOVE"
    print(f"{name}: peak {peaks} MB more than before, {word} {bound / 1e6:.0f} MB; {rows[0][1]:.1f} s", flush=True)


def from_the_run(folder: Path, gigabytes: float) -> None:
    """Measures every export of a running engine, and saves its checkpoints."""
    import torch.distributed as dist

    from hdpissa.benchmarks import plain_engine
    from hdpissa.engine import decompose, initialize, load_pretrained, zero3

    zero3.init_distributed()
    if dist.get_rank() == 0:
        write_model(folder, gigabytes)
    dist.barrier()
    decompose.compute_slices = plain_engine.random_slices  # type: ignore[assignment]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": max(1, SLICES // dist.get_world_size()),
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
        "hd_pissa": {"r": R, "slices": SLICES},
    }
    engine = initialize(model=load_pretrained(str(folder), config), config=config)
    store = engine.optimizer.store
    store.delta_sum.normal_(std=1e-4)
    engine.optimizer.apply_sums()
    engine.optimizer.updates = 1
    sizes = [zero3.full_numel(p) for p in engine.module.parameters()]
    bound = 4 * max(sizes) / dist.get_world_size() + ALLOWANCE_BYTES
    held = f"{anonymous_bytes() / 1e6:.0f} MB held by rank 0"
    print_first = print if dist.get_rank() == 0 else lambda *text: None
    print_first(f"model {2 * sum(sizes) / 1e9:.2f} GB in bf16, {dist.get_world_size()} ranks, {held}")
    for options in exports():
        row = measured(engine.export, folder / "export", **options)
        rows: list = [None] * dist.get_world_size()
        dist.all_gather_object(rows, row)
        if dist.get_rank() == 0:
            show(str(options), rows, bound)
            shutil.rmtree(folder / "export")
        dist.barrier()
    for kind in KINDS:
        engine.save_checkpoint(folder / f"checkpoints-{kind}", kind=kind)
    zero3.shut_down()


def from_checkpoints(folder: Path) -> None:
    """Measures launch/export.py on both kinds; one process, one shard: the whole tensor."""
    from hdpissa.launch import export, export_checkpoint  # noqa: F401  (what the command imports is no peak)

    print(f"{anonymous_bytes() / 1e6:.0f} MB held by the process before")
    for kind in KINDS:
        for options in exports():
            argv = ["--checkpoint", str(folder / f"checkpoints-{kind}"), "--output_dir", str(folder / "export")]
            argv += [text for name, value in options.items() for text in (f"--{name}", str(value))]
            show(f"{kind} {options}", [measured(export.main, argv)], ALLOWANCE_BYTES)
            shutil.rmtree(folder / "export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--folder", required=True, help="where the model is, or will be written")
    parser.add_argument("--offline", action="store_true", help="from the checkpoints of the first command")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.offline:
        from_checkpoints(Path(args.folder))
    else:
        from_the_run(Path(args.folder), args.gigabytes)


if __name__ == "__main__":
    main()
