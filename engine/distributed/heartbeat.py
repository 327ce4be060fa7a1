"""This process's heartbeat: where in the run it is, and when it last made progress.

`beat("step.forward")` marks a point of the run, where a fault of that name can be injected, too (`faults`). Other ranks
read the last beat (`rank_status`): when a run makes no progress, the rank that is behind is the one that hangs.

A beat sets a tuple, in about 0.3 µs; `progress`, within a long stretch (each layer, each tensor), takes 0.1 µs. Nothing
is sent, nothing is locked. Module state and not an object, because a process has one main thread to report on.

Beats are counted, and all ranks must pass the same ones in the same order, or the comparison is void. What one rank
does by itself is therefore a `single_rank`, which is not counted. Calls of `progress` need not agree.
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
    """Where a rank is.

    Attributes:
        step: the current optimizer step, from 1; 0 before the first. point: the last point it passed.
        count: beats so far. ticks: calls of `progress` since the last.
        idle_s: seconds since the last of either. slow: whether the stretch may take long without a beat.
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


def beat(point: str, *, slow: bool = False) -> str | None:
    """Marks a point of the run; returns what `faults.fault` returns there.

    Args:
        slow: what follows may take longer than a step ever does (decomposing a matrix).
    """
    global _beat, _ticks, _moved
    _beat = (_beat[0], point, _beat[2] + 1, slow)
    _ticks, _moved = 0, time.monotonic()
    return faults.fault(point)


def progress() -> None:
    """Marks progress between two beats."""
    global _ticks, _moved
    _ticks += 1
    _moved = time.monotonic()


def at_step(step: int) -> None:
    """Begins an optimizer step, from 1."""
    global _beat
    _beat = (step, *_beat[1:])
    faults.at_step(step)


@contextmanager
def single_rank(what: str) -> Iterator[None]:
    """What one rank does while the others wait in the next collective; also the fault point `single_rank.what`."""
    global _beat, _moved
    before, _moved = _beat, time.monotonic()
    _beat = (before[0], f"single-rank work: {what}", before[2], before[3])
    faults.fault(f"single_rank.{what}")
    yield
    _beat, _moved = before, time.monotonic()  # not after an exception: its last message names the place


def idle_s() -> float:
    """Seconds since this process made progress."""
    return time.monotonic() - _moved


def report() -> Report:
    """This process's report; from any thread."""
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
