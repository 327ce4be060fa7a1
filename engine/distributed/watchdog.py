"""Ends a run that cannot go on, where no exception would.

A collective that waits for a rank that hangs is blocked in C++, where Python cannot interrupt it, and NCCL aborts the
process when its own time is over. So a thread watches this process's pulse, and ends the process itself, after one
line. It does nothing while the run moves. When it stands:

* after a few seconds it looks whether the next rank's process is gone, or words were left at the own door;
* at 3/4 of the time that the run may stand still, or somewhat less, it asks all ranks, and ends the run when none of
  them moves.

A rank that works for long without a beat therefore needs a place marked `slow` (`heartbeat.reach`): there four times as
long counts, or the backend's time-out if that is longer, unless a rank does not answer at all. What is found must be
found twice in a row, so that a hiccup of the network ends nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from . import blame, heartbeat
from .peers import Peers, patience

SHARE = 0.75
SLOWER = 4
SETTLE_S = 5.0  # an exception of the backend's gets so long to say the same, with a traceback's context


def pause(limit_s: float) -> float:
    """Seconds between two looks."""
    return min(2.5, limit_s / 20)


def asked_after(limit_s: float) -> float:
    """Seconds of standing still after which the ranks are asked: what is left of the limit is for asking and speaking.

    That takes two looks, four waits for a rank that says nothing, and 5 s for the lines of all ranks: 18 s at most. A
    limit below 14 s is overrun by the rest, because half of it is the least.
    """
    needed = 2 * pause(limit_s) + 4 * patience(limit_s) + 5
    return max(limit_s / 2, min(SHARE * limit_s, limit_s - needed))


class Watch(threading.Thread):
    """Watches the pulse of this process.

    Args:
        end: called once, in this thread, when the run cannot go on.
    """

    def __init__(self, peers: Peers, end: Callable[[], None]) -> None:
        super().__init__(name="watch", daemon=True)
        self._peers, self._end = peers, end
        self._settle, self._limit = min(SETTLE_S, peers.hang_s / 4), asked_after(peers.hang_s)
        self._slow = max(SLOWER * peers.hang_s, peers.timeout_s)
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        before = ""
        while not self._stopped.wait(pause(self._peers.hang_s)):
            found = self._look() if heartbeat.idle_s() >= self._settle else ""
            if (found and found == before) or (found == "heard"):
                if not self._stopped.is_set():
                    self._end()
                return
            before = found

    def _look(self) -> str:
        """What ends the run, if seen again; empty when nothing does."""
        if self._peers.heard:
            return "heard"
        if heartbeat.idle_s() < self._limit:
            return "ended" if self._peers.next_has_ended() else ""
        answers = self._peers.ask_all()
        still = len(answers) > 1 and blame.stands_still(answers, self._limit, self._slow)
        return "still" if still else ""
