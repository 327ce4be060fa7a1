"""How large is a checkpoint, and how long does training pause for it: full and small, at once and in the background?

    python benchmarks/memory/checkpoint.py [--model M] [--ranks 2] [--slices 8] [--r 16] [--rounds 5]

fp32 compute, one optimizer step on random tokens before, so that no moment is zero. In every round each kind is saved
at once and in the background, the order rotating; a round before the first one is not counted, because it also writes
the slices' fixed factors. Of a save in the background also the whole time, until it is on the disk. Times are
medians over the rounds, of the slowest rank, and those of the disk that holds the temporary folder.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hdpissa.benchmarks.common import ranks, timing

KINDS = ("full", "small")
COLUMNS = ["kind", "files MB", "of them fixed factors MB", "pause at once s", "pause in background s", "in all s"]


def seconds(action: Callable[[], Any]) -> float:
    """Of the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    action()
    spent = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return spent.item()


def save(engine: Any, kind: str, background: bool, folder: Path) -> dict[str, float]:
    """The times of a save that replaces the last one of its kind."""
    pause = seconds(lambda: engine.save_checkpoint(folder / kind, "last", kind=kind, async_save=background))
    if not background:
        return {"pause at once s": pause}
    return {"pause in background s": pause, "in all s": pause + seconds(engine.wait_for_checkpoint)}


def measure(folder: str, model: str, r: int, slices: int, rounds: int) -> dict[str, Any]:
    """A rank's part: kind → time → its value in each round; the files are in `folder`."""
    from hdpissa.engine import initialize, load_pretrained
    from hdpissa.engine.sharding import zero3

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": max(1, slices // dist.get_world_size()),
        "zero_optimization": {"stage": 3},
        "hd_pissa": {"r": r, "slices": slices},
    }
    engine = initialize(model=load_pretrained(model, config), config=config)
    model_config: Any = engine.module.config
    ids = torch.randint(0, model_config.vocab_size, (1, 16), device=zero3.device())
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    ways = {(kind, way): partial(save, engine, kind, way, Path(folder)) for kind in KINDS for way in (False, True)}
    found: dict[str, Any] = {kind: {} for kind in KINDS}
    for (kind, _), times in timing.in_turns(ways, rounds).items():
        found[kind] |= {name: [each[name] for each in times] for name in times[0]}
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


def main(argv: list[str] | None = None) -> None:
    parser = timing.Parser(__doc__)
    parser.add_argument("--model", help="Hugging Face folder or hub name; default: the demo's SmolLM2-135M")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind and way")
    args = parser.parse_args(argv)
    args.model = args.model or timing.demo_model()
    with tempfile.TemporaryDirectory() as folder:
        job = {"model": args.model, "r": args.r, "slices": args.slices, "rounds": args.rounds}
        found = ranks.launch(measure, args.ranks, folder=folder, **job)[0]
        rows = [row(kind, samples, Path(folder)) for kind, samples in found.items()]
    share = rows[1]["files MB"] / rows[0]["files MB"]
    note = f"All ranks on one host, fp32 compute. A small checkpoint has {share:.1%} of a full one's bytes."
    headline = ", ".join(
        f"{row['kind']} {row['files MB']:.0f} MB: training pauses {row['pause at once s']:.2f} s, in the background "
        f"{row['pause in background s']:.2f} s"
        for row in rows
    )
    timing.write("checkpoint", args, rows, COLUMNS, note, identity=("kind",), headline=headline)


if __name__ == "__main__":
    raise SystemExit(timing.run(main))
