"""Ends a run that cannot continue, where no exception would.

A collective that waits for a rank that hangs is blocked in C++, where Python cannot interrupt it, and NCCL aborts the
process when its own time-out expires. So a thread watches this process's heartbeat, and ends the process itself, after
one line. It does nothing while the run makes progress. Without progress:

* after a few seconds it checks whether the next rank's process has exited, or a message has arrived;
* after 3/4 of the time that the run may make no progress, or somewhat less, it queries all ranks, and ends the run when
  none of them makes progress.

A rank that works for long without a beat therefore needs a point marked `slow` (`heartbeat.beat`): there four times as
long is allowed, or the backend's time-out if that is longer, unless a rank does not answer at all. A finding must be
made twice in a row, so that a hiccup of the network ends nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from . import diagnosis, heartbeat
from .rank_status import RankGroup, query_timeout

SHARE = 0.75
SLOWER = 4
SETTLE_S = 5.0  # time for an exception of the backend, which has a traceback


def poll_interval(limit_s: float) -> float:
    """Seconds between two checks."""
    return min(2.5, limit_s / 20)


def query_after_s(limit_s: float) -> float:
    """Seconds without progress after which all ranks are queried; the rest of the limit is for queries and messages.

    That takes two checks, four timeouts of a rank that does not answer, and 5 s for the messages of all ranks: 18 s at
    most. Limits below 14 s are overrun, because at least half of a limit passes before the first query.
    """
    needed = 2 * poll_interval(limit_s) + 4 * query_timeout(limit_s) + 5
    return max(limit_s / 2, min(SHARE * limit_s, limit_s - needed))


class Watcher(threading.Thread):
    """The thread that watches this process's heartbeat.

    Args:
        end: called once, in this thread, when the run cannot continue.
    """

    def __init__(self, ranks: RankGroup, end: Callable[[], None]) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._ranks, self._end = ranks, end
        self._settle, self._limit = min(SETTLE_S, ranks.hang_s / 4), query_after_s(ranks.hang_s)
        self._slow = max(SLOWER * ranks.hang_s, ranks.timeout_s)
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        before = ""
        while not self._stopped.wait(poll_interval(self._ranks.hang_s)):
            found = self._check() if heartbeat.idle_s() >= self._settle else ""
            if (found and found == before) or (found == "received"):
                if not self._stopped.is_set():
                    self._end()
                return
            before = found

    def _check(self) -> str:
        """What ends the run if it is found again; empty when nothing does."""
        if self._ranks.received:
            return "received"
        if heartbeat.idle_s() < self._limit:
            return "exited" if self._ranks.next_rank_exited() else ""
        answers = self._ranks.query_all()
        still = len(answers) > 1 and diagnosis.no_progress(answers, self._limit, self._slow)
        return "still" if still else ""
