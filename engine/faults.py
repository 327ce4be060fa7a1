"""Faults on purpose, for tests: `fault("save.rename")` does nothing unless HDPISSA_FAULT names that point.

    HDPISSA_FAULT=point:rank:step:action[:nth]

A rank or step may be `*`. The action happens at the nth passage (from 1, default 1) of the point in that step:

    KILL TERM STOP   the signal of that name, to this process
    RAISE            RuntimeError
    ENOSPC EIO       OSError with that number
    SLEEP            stands still for an hour, as a hung process does, other threads alive
    NAN INF FLIP     for the caller: `fault` returns the action's name, and the caller spoils its own data

Steps are what `at_step` was last told. Faults are read once, at import.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass

VARIABLE = "HDPISSA_FAULT"
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "STOP": signal.SIGSTOP}
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
SPOILS = ("NAN", "INF", "FLIP")
FOREVER_S = 3600


@dataclass(frozen=True)
class Fault:
    """What is to go wrong, where and when; None stands for any rank or step."""

    point: str
    rank: int | None
    step: int | None
    action: str
    nth: int = 1

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Raises ValueError for a text that is none: a test whose fault never happens would pass."""
        point, rank, step, action, *nth = text.split(":")
        if action not in {*SIGNALS, *ERRORS, *SPOILS, "RAISE", "SLEEP"}:
            raise ValueError(f"{VARIABLE}: there is no action {action!r}")
        at = [None if value == "*" else int(value) for value in (rank, step)]
        return cls(point, at[0], at[1], action, int(nth[0]) if nth else 1)

    def happens(self, point: str, rank: int, step: int, passage: int) -> bool:
        return point == self.point and self.rank in (None, rank) and self.step in (None, step) and passage == self.nth


_fault = Fault.parse(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None
_step = 0
_passages: Counter[tuple[str, int]] = Counter()


def at_step(step: int) -> None:
    """Tells which step the faults that follow belong to."""
    global _step
    _step = step


def fault(point: str) -> str | None:
    """A place where a fault can happen; returns the action where the caller has to carry it out."""
    if _fault is None:
        return None
    _passages[point, _step] += 1
    if not _fault.happens(point, int(os.environ.get("RANK", "0")), _step, _passages[point, _step]):
        return None
    return _act(_fault.action, point)


def _act(action: str, point: str) -> str | None:
    if action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    elif action in ERRORS:
        raise OSError(ERRORS[action], f"{os.strerror(ERRORS[action])} ({VARIABLE} at {point})")
    elif action == "RAISE":
        raise RuntimeError(f"{VARIABLE} at {point}")
    elif action == "SLEEP":
        time.sleep(FOREVER_S)
    else:
        return action
    return None
