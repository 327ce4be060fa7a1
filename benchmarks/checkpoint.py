"""How large is a checkpoint, and how long does training pause for it: full and small, at once and in the background?

    python benchmarks/checkpoint.py [--model M] [--ranks 2] [--slices 8] [--r 16]

fp32 compute, one optimizer step on random tokens before, so that no moment is zero. Each kind is saved at once, at
once again, and in the background; the first is not counted, because it also writes the slices' fixed factors. Beside
it the whole time of the save in the background, until it is on the disk.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hdpissa.benchmarks import ranks, timing

COLUMNS = ["kind", "files MB", "of them fixed factors MB", "pause at once s", "pause in background s", "in all s"]


def seconds(action: Callable[[], Any]) -> float:
    """Of the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    action()
    spent = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return spent.item()


def one_step(engine: Any, batch: dict) -> None:
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(**batch).loss)
        engine.step()


def row(engine: Any, kind: str, folder: Path) -> dict[str, Any]:
    """The figures of one kind, of saves that replace one another."""

    def save(background: bool) -> None:
        engine.save_checkpoint(folder / kind, "last", kind=kind, async_save=background)

    seconds(lambda: save(False))
    at_once = seconds(lambda: save(False))
    pause = seconds(lambda: save(True))
    rest = seconds(engine.wait_for_checkpoint)
    files = {p.name: p.stat().st_size for p in (folder / kind / "last").iterdir()} if engine.plan.rank == 0 else {}
    return {
        "kind": kind,
        "files MB": sum(files.values()) / 1e6,
        "of them fixed factors MB": sum(n for name, n in files.items() if name.startswith("factors")) / 1e6,
        "pause at once s": at_once,
        "pause in background s": pause,
        "in all s": pause + rest,
    }


def measure(model: str, r: int, slices: int) -> dict[str, Any]:
    """A rank's part: rows and note."""
    from hdpissa.engine import initialize, load_pretrained, zero3

    zero3.init_distributed()
    count = dist.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": max(1, slices // count),
        "zero_optimization": {"stage": 3},
        "hd_pissa": {"r": r, "slices": slices},
    }
    engine = initialize(model=load_pretrained(model, config), config=config)
    ids = torch.randint(0, engine.module.config.vocab_size, (1, 16), device=zero3.device())
    one_step(engine, {"input_ids": ids, "labels": ids})
    place: list[Any] = [tempfile.mkdtemp() if engine.plan.rank == 0 else None]
    dist.broadcast_object_list(place, 0)
    try:
        rows = [row(engine, kind, Path(place[0])) for kind in ("full", "small")]
    finally:
        if engine.plan.rank == 0:
            shutil.rmtree(place[0])
    zero3.shut_down()
    return {
        "rows": rows,
        "note": f"{Path(model).name}, S = {slices}, r = {r}, {count} ranks on one host, fp32 compute.",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder or hub name; default: the demo's SmolLM2-135M")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--out", type=Path, help="set by the script itself, for the ranks")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    args = parser.parse_args()
    if args.out:
        ranks.answer(args.out, measure(args.model, args.r, args.slices))
        return
    if args.model is None:
        from hdpissa.launch.demo_model import ensure_demo_model

        args.model = ensure_demo_model()
    arguments = ("--model", args.model, "--r", args.r, "--slices", args.slices)
    found = ranks.launch(__file__, args.ranks, *arguments)
    full, small = rows = found["rows"]
    share = small["files MB"] / full["files MB"]
    note = f"{found['note']} A small checkpoint has {share:.1%} of a full one's bytes."
    headline = (
        f"full {full['files MB']:.0f} MB, small {small['files MB']:.0f} MB; training pauses "
        f"{full['pause at once s']:.2f} s, in the background {full['pause in background s']:.2f} s"
    )
    timing.write("checkpoint", rows, COLUMNS, note, identity=("kind",), headline=headline)


if __name__ == "__main__":
    main()
