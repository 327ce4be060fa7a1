"""This process's pulse: where in the run it is, and when it last moved.

One call marks a place of the run: `reach("step.forward")` is a beat, and the place where a fault of that name can be
planted (`faults`). What others read of it (`peers`) is the last beat: when a run stands still, the rank that is behind
is the one that hangs.

A beat sets a tuple: about 0.3 µs; a tick, for movement within a long stretch (each layer, each tensor), 0.1 µs. Nothing
is sent, nothing is locked. Module state and not an object, because a process has one main thread to tell of.

Beats are counted, and all ranks have to come by the same ones in the same order, or the comparison is void; so what one
rank does alone is an `alone`, which is not counted. Ticks need not agree.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from . import faults

# Code in which a rank waits for others, and so is not the one that hangs.
WAITING_FOLDERS = ("torch/distributed", "deepspeed/comm")
WAITING_FUNCTIONS = ("wait", "synchronize")  # of torch and DeepSpeed; threading has a `wait`, too
INNERMOST = 4  # frames that are looked at


@dataclass(frozen=True)
class Report:
    """What a rank says of itself.

    Attributes:
        step: the optimizer step it works on, from 1; 0 before the first. point: the last place it came by.
        count: beats so far. ticks: movements since the last one.
        idle_s: seconds since it moved. slow: whether it works on something that may take long without a beat.
        waiting: whether its main thread is in a collective. where: the code it is in.
    """

    step: int
    point: str
    count: int
    ticks: int
    idle_s: float
    slow: bool
    waiting: bool
    where: str

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Report:
        """Raises ValueError or TypeError for anything else than a report."""
        report = cls(**json.loads(line))
        float(report.step + report.count + report.ticks + report.idle_s)  # TypeError where one is none
        return report

    @property
    def place(self) -> str:
        """ "step 7, forward"."""
        point = self.point.removeprefix("step.")
        return f"step {self.step}, {point}" if self.step else f"{point}, before the first step"


_beat = (0, "start", 0, True)  # step, point, count, slow
_ticks = 0
_moved = time.monotonic()


def reach(point: str, *, slow: bool = False) -> str | None:
    """Comes by a place of the run; returns what `faults.fault` says about it.

    Args:
        slow: one thing that follows may take longer than a step ever does (decomposing a matrix).
    """
    global _beat, _ticks, _moved
    _beat = (_beat[0], point, _beat[2] + 1, slow)
    _ticks, _moved = 0, time.monotonic()
    return faults.fault(point)


def tick() -> None:
    """Moves on within a stretch."""
    global _ticks, _moved
    _ticks += 1
    _moved = time.monotonic()


def at_step(step: int) -> None:
    """Begins an optimizer step, from 1."""
    global _beat
    _beat = (step, *_beat[1:])
    faults.at_step(step)


@contextmanager
def alone(what: str) -> Iterator[None]:
    """What one rank does while the others go on to the next collective and wait; also the fault point `alone.what`."""
    global _beat, _moved
    before, _moved = _beat, time.monotonic()
    _beat = (before[0], f"alone: {what}", before[2], before[3])
    faults.fault(f"alone.{what}")
    yield
    _beat, _moved = before, time.monotonic()  # not after an exception: the last words tell where it was


def idle_s() -> float:
    """Seconds since this process moved."""
    return time.monotonic() - _moved


def report() -> Report:
    """For others, from any thread."""
    step, point, count, slow = _beat
    waiting, where = _look_at_main_thread()
    return Report(step, point, count, _ticks, round(idle_s(), 2), slow, waiting, where)


def _look_at_main_thread() -> tuple[bool, str]:
    """(whether it waits for others, "file.py:12 in function")."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return False, "its end"
    where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
    for _ in range(INNERMOST):
        if frame is None:
            break
        folder = Path(frame.f_code.co_filename).parent.as_posix()
        waits = frame.f_code.co_name in WAITING_FUNCTIONS and ("/torch/" in folder or "/deepspeed/" in folder)
        if waits or folder.endswith(WAITING_FOLDERS):
            return True, where
        frame = frame.f_back
    return False, where
