"""Phase `throughput` of gpu.py: whole steps of four models through the launcher, all methods, on one GPU.

One GPU does what eight would: as many slices, and a micro-batch of its own for each. A row for each run
(throughput.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.gpu import gpu_rows
from hdpissa.benchmarks.step import throughput, throughput_table, throughput_work

MODELS = ("smollm2-135m", "0.5b", "1.5b", "llama-2-7b")
OPTIONS = ("--num_accelerators", "1", "--slices", "8", "--accumulation", "8", "--steps", "4", "--warmup", "2")
DRY = ("--methods", "hd_pissa", "frozen", "--num_accelerators", "1", "--steps", "1", "--warmup", "0")
RUN_S = 300  # a method that hangs is ended, and the others still run


def rows_of(model: str, options: tuple[str, ...], folder: str) -> Iterator[dict[str, Any]]:
    args = throughput.parse([*options, "--model", model, "--timeout", str(RUN_S), "--folder", folder])
    work = throughput_work.model_work(args.model, args.layers)
    seen: set[tuple[Any, ...]] = set()
    for runs, failures in throughput.run_all(args):
        for row in throughput_table.table(runs, failures, work):
            identity = tuple(row[column] for column in throughput_table.IDENTITY)
            if identity not in seen:
                seen.add(identity)
                yield {"table": model, **row}


def rows() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        if gpu_rows.is_dry():
            yield from rows_of("tiny", DRY, folder)
            return
        for model in MODELS:
            yield from rows_of(model, OPTIONS, folder)


if __name__ == "__main__":
    timing.need_gpu()
    raise SystemExit(gpu_rows.record_all(rows()))
