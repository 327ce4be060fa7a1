"""How large is a checkpoint, and how long does training pause for it: full and small, at once and in the background?

    python benchmarks/memory/checkpoint.py [--model M] [--ranks 2] [--slices 8] [--r 16] [--rounds 5]

fp32 compute, one optimizer step on random tokens before, so that no moment is zero. In every round each kind is saved
at once and in the background, the order rotating; a round before the first one is not counted, because it also writes
the slices' fixed factors. Beside it the whole time of the save in the background, until it is on the disk. Times are
medians over the rounds, of the slowest rank. What else uses the machine or its disk is in them.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hdpissa.benchmarks.common import ranks, timing

KINDS = ("full", "small")
TIMES = ("pause at once s", "pause in background s", "in all s")
COLUMNS = ["kind", "files MB", "of them fixed factors MB", *TIMES]


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


def save_once(engine: Any, kind: str, background: bool, folder: Path) -> dict[str, float]:
    """The times of a save that replaces the last one of its kind."""
    pause = seconds(lambda: engine.save_checkpoint(folder / kind, "last", kind=kind, async_save=background))
    if not background:
        return {"pause at once s": pause}
    return {"pause in background s": pause, "in all s": pause + seconds(engine.wait_for_checkpoint)}


def saves(engine: Any, folder: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Kind → time → its value in each round."""
    ways = [(kind, background) for kind in KINDS for background in (False, True)]
    found: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in TIMES} for kind in KINDS}
    for number in range(rounds + 1):
        start = number % len(ways)
        for kind, background in ways[start:] + ways[:start]:
            spent = save_once(engine, kind, background, folder)
            for name, value in spent.items() if number else ():
                found[kind][name].append(value)
    return found


def row(kind: str, samples: dict[str, list[float]], folder: Path) -> dict[str, Any]:
    """The figures of one kind."""
    files = {path.name: path.stat().st_size for path in (folder / kind / "last").iterdir()}
    return {
        "kind": kind,
        "files MB": sum(files.values()) / 1e6,
        "of them fixed factors MB": sum(n for name, n in files.items() if name.startswith("factors")) / 1e6,
        **{name: statistics.median(values) for name, values in samples.items()},
        "samples": samples,
    }


def measure(model: str, r: int, slices: int, rounds: int) -> dict[str, Any]:
    """A rank's part: rows and note."""
    from hdpissa.engine import initialize, load_pretrained
    from hdpissa.engine.sharding import zero3

    zero3.init_distributed()
    count = dist.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": max(1, slices // count),
        "zero_optimization": {"stage": 3},
        "hd_pissa": {"r": r, "slices": slices},
    }
    engine = initialize(model=load_pretrained(model, config), config=config)
    config_of_model: Any = engine.module.config
    ids = torch.randint(0, config_of_model.vocab_size, (1, 16), device=zero3.device())
    one_step(engine, {"input_ids": ids, "labels": ids})
    place: list[Any] = [tempfile.mkdtemp() if engine.plan.rank == 0 else None]
    dist.broadcast_object_list(place, 0)
    try:
        found = saves(engine, Path(place[0]), rounds)
        here = engine.plan.rank == 0
        rows = [row(kind, samples, Path(place[0])) for kind, samples in found.items()] if here else []
    finally:
        if engine.plan.rank == 0:
            shutil.rmtree(place[0])
    zero3.shut_down()
    return {
        "rows": rows,
        "note": f"{Path(model).name}, S = {slices}, r = {r}, {count} ranks on one host, fp32 compute; "
        f"medians of {rounds} rounds.",
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder or hub name; default: the demo's SmolLM2-135M")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind and way")
    timing.add_result_options(parser)
    ranks.add_options(parser)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if args.out:
        ranks.answer(args.out, measure(args.model, args.r, args.slices, args.rounds))
        return
    if args.model is None:
        from hdpissa.launch.demo_model import ensure_demo_model

        args.model = ensure_demo_model()
    name, configuration = timing.result_of("checkpoint", args)
    arguments = ("--model", args.model, "--r", args.r, "--slices", args.slices, "--rounds", args.rounds)
    found = ranks.launch(__file__, args.ranks, *arguments)
    full, small = rows = found["rows"]
    share = small["files MB"] / full["files MB"]
    note = f"{found['note']} A small checkpoint has {share:.1%} of a full one's bytes."
    headline = ", ".join(
        f"{row['kind']} {row['files MB']:.0f} MB: training pauses {row['pause at once s']:.2f} s, in the background "
        f"{row['pause in background s']:.2f} s"
        for row in rows
    )
    kept: dict[str, Any] = {"identity": ("kind",), "configuration": configuration, "headline": headline}
    timing.write(name, rows, COLUMNS, note, folder=args.folder, **kept)


if __name__ == "__main__":
    raise SystemExit(timing.run(main))
