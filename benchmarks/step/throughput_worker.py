"""One method at one number of processes: takes its steps and writes its record. throughput.py launches it.

    deepspeed --num_accelerators 2 benchmarks/step/throughput_worker.py --job JOB.json --record RECORD.json

JOB.json holds the method's name, its `Setting`, and how many steps to take. Rank 0 writes RECORD.json. A rank that
fails leaves one line in RECORD.json.failed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def restart_peak() -> None:
    """Forgets the peak of memory so far, and gives what the building of the model has freed back to the system."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")  # of proc(5): resets VmHWM


def peak_bytes() -> int:
    """The peak since then: allocated on the GPU, or resident of the process, libraries included."""
    from hdpissa.engine.sharding import zero3

    if CLEAR.exists() and zero3.device().type == "cpu":
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return zero3.peak_memory_bytes()


def take_step(method: Any, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """One optimizer step from a common start: wall and CPU seconds of this rank, bytes, phases."""
    import torch.distributed as dist

    from hdpissa.engine.sharding import zero3

    dist.barrier()
    zero3.fence()
    method.wire.reset()
    start, cpu = time.perf_counter(), time.process_time()
    losses = [method.micro_step(batch) for batch in batches]
    method.step()
    zero3.fence()
    figures: dict[str, Any] = {"step_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    figures |= {"sent": method.wire.sent, "calls": method.wire.calls, "received": method.wire.received}
    figures |= {"phases": method.phases(), "loss": sum(loss.item() for loss in losses) / len(losses)}
    return figures


def count_flops(method: Any, batches: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """FLOP of one more step on this rank, by torch's counter: of its passes and of the optimizer, by operation."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as passes:
        for batch in batches:
            method.micro_step(batch)
    with FlopCounterMode(display=False) as update:
        method.step()
    counters = {"passes": passes, "update": update}
    return {
        part: {str(op): n for op, n in counter.get_flop_counts().get("Global", {}).items()}
        for part, counter in counters.items()
    }


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """What this rank found."""
    import torch.distributed as dist

    from hdpissa.benchmarks.step import method_models, throughput_work
    from hdpissa.benchmarks.step.methods import Setting, build
    from hdpissa.engine.sharding import zero3

    setting = Setting(**job["setting"])
    start = time.perf_counter()
    method = build(job["method"], setting)
    built = time.perf_counter() - start
    vocabulary = method_models.config_of(setting.model, setting.layers).vocab_size
    rank = dist.get_rank()
    work = throughput_work.work(setting, max_length=job["max_length"], vocabulary=vocabulary, rank=rank)
    restart_peak()
    steps = [take_step(method, work.batches) for _ in range(job["warmup"] + job["steps"])][job["warmup"] :]
    peak, moved = peak_bytes(), dict(method.wire.by_name)
    return {
        "steps": steps,
        "peak_bytes": peak,
        "sent_by_name": moved,
        "flops": count_flops(method, work.batches) if job.get("count_flops") else {},
        "build_s": built,
        "lengths": work.lengths,
        "padded_tokens": work.padded,
        "exchange_bytes": getattr(method, "exchange_bytes", None),
        "device": zero3.accelerator_name(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    args = parser.parse_args(argv)
    job = json.loads(args.job.read_text())
    try:
        import torch.distributed as dist

        from hdpissa.engine.sharding import zero3

        found = measure(job)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, found)
        if dist.get_rank() == 0:
            args.record.write_text(json.dumps({"method": job["method"], "ranks": ranks}))
        zero3.part()
        zero3.shut_down()
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        failed = args.record.with_name(args.record.name + ".failed")
        if not failed.exists():  # the others fail because of the first
            failed.write_text(f"{type(error).__name__}: {lines[0]}")
        sys.stderr.flush()
        os._exit(1)  # the other ranks wait in a collective; the launcher ends them


if __name__ == "__main__":
    main()
