"""What a rank of a throughput run does: one method's steps on rows of random tokens, measured.

Rows have lengths between a quarter of `max_length` and all of it and are padded to the longest of their batch, so real
tokens and padded ones are two numbers. A rank's micro-batches are the same in every step: then a step's time
varies with the machine alone.
"""

from __future__ import annotations

import ctypes
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hdpissa.benchmarks.step import method_models
from hdpissa.benchmarks.step.methods import Setting, build
from hdpissa.engine.sharding import zero3

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Rows:
    """A rank's micro-batches of a step, and the length of every row."""

    batches: list[dict[str, Tensor]]
    lengths: list[int]

    @property
    def padded(self) -> int:
        """Tokens with padding."""
        return sum(batch["input_ids"].numel() for batch in self.batches)


def make_rows(setting: Setting, *, max_length: int, vocabulary: int, rank: int) -> Rows:
    """Other tokens on each rank, but rows of the same lengths, or scaling would measure the longest rows."""
    draw = torch.Generator().manual_seed(1_000_003 * setting.seed + rank)
    lengths_draw = torch.Generator().manual_seed(setting.seed)
    shortest = max(2, max_length // 4)
    batches, lengths = [], []
    for _ in range(setting.accumulation):
        sizes = torch.randint(shortest, max_length + 1, (setting.micro_batch,), generator=lengths_draw).tolist()
        ids = [torch.randint(0, vocabulary, (size,), generator=draw) for size in sizes]
        labels = pad_sequence(ids, batch_first=True, padding_value=-100)
        attention_mask = (labels >= 0).long()
        batches.append({"input_ids": labels * attention_mask, "attention_mask": attention_mask, "labels": labels})
        lengths += sizes
    return Rows(batches, lengths)


def restart_peak() -> None:
    """Forgets the peak of memory so far, and gives what the building of the model has freed back to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")  # of proc(5): resets VmHWM


def peak_bytes() -> int:
    """The peak since then: allocated on the GPU, or resident of the process, libraries included."""
    if CLEAR.exists() and zero3.device().type == "cpu":
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return zero3.peak_memory_bytes()


def take_step(method: Any, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """One optimizer step from a common start: wall and CPU seconds of this rank, bytes, phases."""
    dist.barrier()
    zero3.fence()
    method.wire.reset()
    start, cpu = time.perf_counter(), time.process_time()
    losses = [method.micro_step(batch) for batch in batches]
    method.step()
    zero3.fence()
    figures: dict[str, Any] = {"step_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    figures |= {"sent": method.wire.sent, "calls": method.wire.calls, "received": method.wire.received}
    return figures | {"phases": method.phases(), "loss": sum(loss.item() for loss in losses) / len(losses)}


def counted_flops(method: Any, batches: list[dict[str, Tensor]]) -> dict[str, dict[str, int]]:
    """FLOP of one more step on this rank, by torch's counter: of its passes and of the optimizer, by operation."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as passes:
        for batch in batches:
            method.micro_step(batch)
    with FlopCounterMode(display=False) as update:
        method.step()
    return {
        part: {str(op): n for op, n in counter.get_flop_counts().get("Global", {}).items()}
        for part, counter in {"passes": passes, "update": update}.items()
    }


def measure(
    method: str, setting: dict[str, Any], max_length: int, steps: int, warmup: int, count_flops: bool = False
) -> dict[str, Any]:
    """What this rank found.

    Args:
        method: its name. setting: the fields of a `Setting`.
        steps: that are measured, after `warmup` others.
    """
    made = Setting(**setting)
    start = time.perf_counter()
    built = build(method, made)
    build_s = time.perf_counter() - start
    vocabulary = method_models.config_of(made.model, made.layers).vocab_size
    rows = make_rows(made, max_length=max_length, vocabulary=vocabulary, rank=dist.get_rank())
    restart_peak()
    taken = [take_step(built, rows.batches) for _ in range(warmup + steps)][warmup:]
    peak, moved = peak_bytes(), dict(built.wire.by_name)
    return {
        "steps": taken,
        "peak_bytes": peak,
        "sent_by_name": moved,
        "flops": counted_flops(built, rows.batches) if count_flops else {},
        "build_s": build_s,
        "lengths": rows.lengths,
        "padded_tokens": rows.padded,
        "exchange_bytes": getattr(built, "exchange_bytes", None),
        "device": zero3.accelerator_name(),
    }
