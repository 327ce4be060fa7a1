"""Phase `profile` of gpu.py: is the device waiting for the host, and which kernels is its time spent in?

One micro-batch and one optimizer step of the 7B model that whole_step.py measures, with the shipped config. `wall` is
measured without the profiler, which slows the host down; `busy` is the time in which at least one kernel or copy of the
profiled run was at work.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hdpissa.benchmarks.gpu import gpu_rows
from hdpissa.benchmarks.step import whole_step
from hdpissa.engine.sharding import zero3

SHOWN, WALLS = 25, 3


class Parts:
    """The engine's two parts: a micro-batch, and what follows the last one's backward pass."""

    def __init__(self, work: whole_step.Work, device: torch.device) -> None:
        self.work, self.device = work, device
        self.engine = whole_step.make_engine(work, device)

    def dropped_micro_batch(self, length: int) -> None:
        """One that is not accumulated, so that it can be repeated."""
        self.micro_batch(length)
        self.engine.zero_grad()

    def micro_batch(self, length: int) -> None:
        ids = torch.randint(0, self.work.sizes[5], (1, length), device=self.device)
        self.engine.backward(self.engine(input_ids=ids, labels=ids).loss)

    def to_the_step(self, length: int) -> None:
        """All micro-batches of a step; the next `engine.step()` is the optimizer's."""
        for number in range(self.work.slices):
            self.micro_batch(length)
            if number < self.work.slices - 1:
                self.engine.step()

    def step(self) -> None:
        result = self.engine.step()
        assert result.applied, result.refusal


def busy_ms(intervals: list[tuple[float, float]]) -> float:
    """Milliseconds that the union of intervals in microseconds covers."""
    covered, end = 0.0, float("-inf")
    for begin, stop in sorted(intervals):
        covered += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return covered / 1e3


def wall_ms(work: Callable[[], None], device: torch.device) -> float:
    whole_step.wait(device)
    start = time.perf_counter()
    work()
    whole_step.wait(device)
    return 1e3 * (time.perf_counter() - start)


def profiled(work: Callable[[], None], device: torch.device) -> Any:
    """The profiler's record of a call."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        work()
        whole_step.wait(device)
    return recorded


def table(part: str, wall: float, recorded: Any) -> Iterator[dict[str, Any]]:
    """One row of shares, then the kernels and the host's operations that take most."""
    # annotations span kernels and the gaps between them
    on_device = [e for e in recorded.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    busy = busy_ms([(event.time_range.start, event.time_range.end) for event in on_device])
    averages = [average for average in recorded.key_averages() if not average.is_user_annotation]
    kernels = [(e.key, e.count, e.self_device_time_total) for e in averages if e.device_type == DeviceType.CUDA]
    calls = [(e.key, e.count, e.self_cpu_time_total) for e in averages if e.device_type == DeviceType.CPU]
    host = sum(us for _, _, us in calls) / 1e3
    yield {
        "table": "shares", "part": part, "wall ms": wall, "busy ms": busy, "busy / wall": busy / wall,
        "host ms, profiled": host, "device events": len(on_device),
    }  # fmt: skip
    for name, figures, whole in (("kernels", kernels, busy), ("host", calls, host)):
        for key, count, us in sorted(figures, key=lambda figure: -figure[2])[:SHOWN]:
            share = 100 * us / 1e3 / whole
            yield {"table": name, "part": part, "name": key[:90], "ms": us / 1e3, "calls": count, "%": share}


def rows() -> Iterator[dict[str, Any]]:
    work, device = whole_step.place(tiny=False)
    parts = Parts(work, device)
    shortest = work.lengths[0][0]
    parts.to_the_step(shortest)  # the first of everything
    parts.step()
    for length, _ in work.lengths:
        once = partial(parts.dropped_micro_batch, length)
        wall = statistics.median(wall_ms(once, device) for _ in range(WALLS))
        yield from table(f"micro-batch of {length}", wall, profiled(once, device))
    walls = []
    for _ in range(WALLS):
        parts.to_the_step(shortest)
        walls.append(wall_ms(parts.step, device))
    parts.to_the_step(shortest)
    yield from table("optimizer step", statistics.median(walls), profiled(parts.step, device))


if __name__ == "__main__":
    code = gpu_rows.record_all(rows())
    zero3.shut_down()
    raise SystemExit(code)
