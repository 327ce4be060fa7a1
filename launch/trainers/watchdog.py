"""Ends a run in one line, in time, when a rank hangs or is lost; `engine/distributed/watchdog.py` tells them apart."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType

from hdpissa.engine.distributed.rank_status import is_loss
from hdpissa.engine.distributed.watchdog import Watcher
from hdpissa.engine.errors import ConfigError, LostError, StopError
from hdpissa.engine.sharding import zero3

GRACE_S = 3.0  # launchers end every rank when one exits: neighbours get so long for their own line
LOST = 1


class Watchdog:
    """Watches the ranks while its block runs; collective.

    An error that means lost ranks becomes a LostError in one line that names them; any other is told to the other
    ranks, which would wait for this one.

    Args:
        timeout_s: of a collective. hang_s: how long the run may stand still.
        steps_done: optimizer steps so far. on_lost: called with the reason before the process ends.
    """

    def __init__(
        self, timeout_s: float, hang_s: float, steps_done: Callable[[], int], on_lost: Callable[[LostError], None]
    ) -> None:
        self._ranks = zero3.connect_ranks(timeout_s, hang_s)
        self._steps_done, self._on_lost = steps_done, on_lost
        self._watcher = Watcher(self._ranks, self._end)

    def __enter__(self) -> Watchdog:
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.stop()
        if error is None:
            return
        if is_loss(error):
            raise self._explain(error) from error
        if not isinstance(error, StopError | ConfigError):  # which every rank raises
            self._ranks.broadcast_failure(error)

    def _explain(self, error: BaseException | None) -> LostError:
        if not self._ranks.claim_report():  # the watcher is about to end this process
            time.sleep(60)
        lost = self._ranks.explain(self._steps_done(), error)
        if not self._ranks.is_lowest_on_host():  # one that is will find the same in a moment
            time.sleep(GRACE_S / 2)
        self._on_lost(lost)
        return lost

    def _end(self) -> None:
        """In the watcher's thread: the main one is blocked in a collective that nothing interrupts."""
        lost = self._explain(None)
        print(f"error: {lost}", file=sys.stderr, flush=True)
        time.sleep(GRACE_S)
        os._exit(LOST)
