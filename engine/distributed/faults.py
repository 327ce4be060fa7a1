"""Fault injection, for tests: `fault("save.rename")` does nothing unless HDPISSA_FAULT names that point.

    HDPISSA_FAULT=point:rank:step:action[:nth]

A rank or step may be `*`. The action happens at the nth passage (from 1, default 1) of the point in that step:

    KILL TERM STOP   the signal of that name, to this process
    RAISE            RuntimeError
    ENOSPC EIO       OSError with that number
    SLEEP            sleeps for an hour, as a hung process does, other threads alive
    GIL              the same, but holds the interpreter, so that no thread of the process runs
    NAN INF FLIP     for the caller: `fault` returns the action's name, and the caller corrupts its own data `corrupt_`

Steps are those of the last `at_step`: optimizer steps from 1, and 0 before the first. Faults are read once, at import.

The points of a run, in order; "step.…" are beats of `heartbeat`, too, and every rank passes them:

    start.model start.shards start.slices     weights are read, sharded, decomposed
    step.data                                 before a step's rows are fetched
    step.forward step.backward                per micro-batch; forward of evaluation and generation is `eval`
    loss loss.value                           corrupts the loss; only the number that is voted on, and not the gradients
    grad.A grad.B                             corrupts the own gradients of the first bucket, before sharers sum them
    step.reduce step.vote step.voted          sharers sum; before and after the vote
    step.exchange step.apply                  per bucket: Δ is computed and sent; W is about to be changed
    apply.weight                              per weight, before it is changed (nth: mid apply)
    step.applied                              W is changed, the moments too
    memory.A memory.own_B memory.B_rows memory.frozen memory.buffer memory.lr memory.exp_avg
                                              corrupts what `integrity` checks, just before it does
    save saved                                around a checkpoint (`disk` and `directory` have points, too)
    export                                    per tensor
    spectra pairs.own_part                    before the spectra; per weight, before ranks send their part of its pair
    single_rank.NAME                          rank 0 is about to write NAME: record (run.json), state (run_state.json),
                                              metrics, samples, card (and tokenizer), report (of reporters, too), folder
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "HDPISSA_FAULT"
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "STOP": signal.SIGSTOP}
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
CORRUPTIONS = ("NAN", "INF", "FLIP")
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
        """Raises ValueError for malformed text: a test whose fault never happens would pass."""
        point, rank, step, action, *nth = text.split(":")
        if action not in {*SIGNALS, *ERRORS, *CORRUPTIONS, "RAISE", "SLEEP", "GIL"}:
            raise ValueError(f"{VARIABLE}: there is no action {action!r}")
        at = [None if value == "*" else int(value) for value in (rank, step)]
        return cls(point, at[0], at[1], action, int(nth[0]) if nth else 1)

    def happens(self, point: str, rank: int, step: int, passage: int) -> bool:
        return point == self.point and self.rank in (None, rank) and self.step in (None, step) and passage == self.nth


_fault = Fault.parse(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None
_step = 0
_passages: Counter[tuple[str, int]] = Counter()


def at_step(step: int) -> None:
    """Sets the step that the following faults belong to."""
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
    elif action == "GIL":
        ctypes.PyDLL(None).sleep(FOREVER_S)  # PyDLL, unlike CDLL, keeps the interpreter
    else:
        return action
    return None


def corrupt_(point: str, tensor: Tensor) -> None:
    """Corrupts the middle element in place when a fault says so: nan, inf, or its lowest bit flipped."""
    how = fault(point)
    if how is None or not tensor.numel():
        return
    flat = tensor.detach().view(-1)
    middle = flat[len(flat) // 2 : len(flat) // 2 + 1]
    if how == "FLIP":
        import torch

        lowest = middle.view(torch.uint8)
        lowest[:1] = lowest[:1] ^ 1  # little-endian
    else:
        middle.fill_(float(how.lower()))


def corrupted(point: str, value: Tensor) -> Tensor:
    """The value, or nan or inf times it when a fault says so; gradients follow."""
    how = fault(point)
    return value if how is None else value * float(how.lower())
