"""How long does a start take that finds its slices in the cache, beside the one that computed them?

    python benchmarks/startup/slice_cache_start.py                       SmolLM2-135M, 1 and 2 ranks, on the CPU
    python benchmarks/startup/slice_cache_start.py --model M --ranks 8

Every start is a run of its own under the deepspeed launcher, with `hd_pissa.init.cache_dir` set: the first one into an
empty folder, which it fills, the second one out of it. Timed on rank 0 is the part of `initialize` that the cache is
for (`decompose.compute_slices`: decomposing, scattering and writing, or reading and comparing with the weights), by
the clock and in processor time, which other processes on the machine disturb least; and by the clock all of
`initialize`, in which DeepSpeed's own work is the same both times. A rank has one thread on a CPU. Files that have just
been written are still in the system's memory when they are read.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hdpissa.benchmarks.common import ranks, timing

PARTS = ("slices s", "slices CPU s", "initialize s")


def start(model: str, cache: Path, rank: int, slices: int, bf16: bool) -> dict[str, Any]:
    """What one rank's start took; runs under the launcher."""
    from hdpissa.engine import initialize, load_pretrained
    from hdpissa.engine.directions import decompose
    from hdpissa.engine.sharding import zero3

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": slices,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": bf16},
        "hd_pissa": {"r": rank, "slices": slices, "init": {"cache_dir": str(cache)}},
    }
    took: dict[str, Any] = {}
    original = decompose.compute_slices

    def timed(*args: Any, **kwargs: Any) -> decompose.InitReport:
        begin, busy = time.perf_counter(), time.process_time()
        report = original(*args, **kwargs)
        took["slices s"], took["slices CPU s"] = time.perf_counter() - begin, time.process_time() - busy
        return report

    decompose.compute_slices = timed
    net = load_pretrained(model, config)
    begin = time.perf_counter()
    engine = initialize(model=net, config=config)
    took["initialize s"] = time.perf_counter() - begin
    took["cached"] = engine.init_report.cached
    zero3.shut_down()
    return took


def both_starts(model: str, count: int, rank: int, slices: int, bf16: bool) -> dict[str, Any]:
    """The row of one number of ranks."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            line = ["--model", model, "--cache", folder, "--r", rank, "--slices", slices, *["--bf16"] * bf16]
            found.append(ranks.launch(__file__, count, *line))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    first, second = found
    assert (first["cached"], second["cached"]) == (False, True)
    row: dict[str, Any] = {"ranks": count, "S·r": slices * rank, "cache MB": size / 1e6}
    for part in PARTS:
        row |= {f"first: {part}": first[part], f"second: {part}": second[part]}
    return row | {f"second / first, {part}": second[part] / first[part] for part in PARTS}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face folder; default: the demo's")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cache", type=Path, help="set by the script itself, for the ranks")
    ranks.add_options(parser)
    timing.add_result_options(parser)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if args.out:
        ranks.answer(args.out, start(args.model, args.cache, args.r, args.slices, args.bf16))
        return
    from hdpissa.launch.demo_model import ensure_demo_model

    args.model = args.model or ensure_demo_model()
    name, configuration = timing.result_of("slice_cache_start", args)
    torch.set_num_threads(1)  # as the ranks, for the note on the environment
    rows = [both_starts(args.model, count, args.r, args.slices, args.bf16) for count in args.ranks]
    share = max(row["second / first, slices CPU s"] for row in rows)
    headline = f"a start from the cache takes {share:.1%} of the CPU time of the decomposition that filled it"
    kept: dict[str, Any] = {"identity": ("ranks", "S·r"), "configuration": configuration, "headline": headline}
    timing.write(name, rows, list(rows[0]), NOTE, folder=args.folder, **kept)


NOTE = (
    "Two starts in a row with a slice cache, which the first one fills; on rank 0, one thread each. slices: computing, "
    "or reading and checking against the weights, seconds by the clock and of processor time; initialize: with all "
    "of DeepSpeed's own work, the same both times. What else the machine does is in the clock's times."
)

if __name__ == "__main__":
    raise SystemExit(timing.run(main))
