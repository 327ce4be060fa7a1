"""How long does a start take that finds its slices in the cache, compared with the one that computed them?

    python benchmarks/startup/slice_cache_start.py [--model M] [--ranks 1 2] [--slices 8] [--r 16]

Every start is a run of its own under the deepspeed launcher, with `hd_pissa.init.cache_dir` set: the first one into an
empty folder, which it fills, the second one out of it. Timed on rank 0 is the part of `initialize` that the cache is
for (`decompose.compute_slices`: decomposing, scattering and writing, or reading and comparing with the weights), by
the clock and in processor time, which other processes on the machine disturb least; and by the clock all of
`initialize`, in which DeepSpeed's own work is the same both times. A rank has one thread on a CPU. Files that have just
been written are still in the system's memory when they are read.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from hdpissa.benchmarks.common import ranks, timing

PARTS = ("slices s", "slices CPU s", "initialize s")


def start(model: str, cache: str, r: int, slices: int, bf16: bool) -> dict[str, Any]:
    """What one rank's start took."""
    from hdpissa.engine import initialize, load_pretrained
    from hdpissa.engine.directions import decompose

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": slices,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": bf16},
        "hd_pissa": {"r": r, "slices": slices, "init": {"cache_dir": cache}},
    }
    took: dict[str, Any] = {}

    def timed(names: tuple[str, ...], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        begin, busy = time.perf_counter(), time.process_time()
        result = function(*args, **kwargs)
        took.update(zip(names, (time.perf_counter() - begin, time.process_time() - busy), strict=False))
        return result

    compute, net = decompose.compute_slices, load_pretrained(model, config)
    with mock.patch.object(decompose, "compute_slices", lambda *a, **k: timed(PARTS[:2], compute, *a, **k)):
        engine = timed(PARTS[2:], initialize, model=net, config=config)
    return took | {"cached": engine.init_report.cached}


def both_starts(count: int, **job: Any) -> dict[str, Any]:
    """The row of one number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = (ranks.launch(start, count, cache=folder, **job)[0] for _ in range(2))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    assert (first["cached"], second["cached"]) == (False, True)
    row: dict[str, Any] = {"ranks": count, "S·r": job["slices"] * job["r"], "cache MB": size / 1e6}
    for part in PARTS:
        row |= {f"first: {part}": first[part], f"second: {part}": second[part]}
    return row | {f"second / first, {part}": second[part] / first[part] for part in PARTS}


def main(argv: list[str] | None = None) -> None:
    parser = timing.Parser(__doc__)
    parser.add_argument("--model", help="Hugging Face folder; default: the demo's")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args(argv)
    args.model = args.model or timing.demo_model()
    job = {"model": args.model, "r": args.r, "slices": args.slices, "bf16": args.bf16}
    rows = [both_starts(count, **job) for count in args.ranks]
    share = max(row["second / first, slices CPU s"] for row in rows)
    note = "Two starts in a row with a slice cache, which the first one fills; rank 0. What else runs is in the clock."
    headline = f"a start from the cache takes {share:.1%} of the CPU time of the decomposition that filled it"
    timing.write("slice_cache_start", args, rows, list(rows[0]), note, identity=("ranks", "S·r"), headline=headline)


if __name__ == "__main__":
    raise SystemExit(timing.run(main))
