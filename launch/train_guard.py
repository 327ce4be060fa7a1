"""After every step: is there a reason not to go on? Steps that are skipped again and again, or corrupted memory.

Every rank comes to the same answer, so all of them raise. Ranks that hang or die are not seen here but by
engine/watch.py.
"""

from __future__ import annotations

import time
from typing import Any

from hdpissa.engine.errors import StopError


class Guard:
    """Made when all weights are in place.

    Args:
        most_skipped: skipped steps in a row that end the run; 0: never.
        every: optimizer steps between two checks for silent corruption; 0: none.
    """

    def __init__(self, engine: Any, most_skipped: int, every: int) -> None:
        from hdpissa.engine.integrity import IntegrityCheck

        self._most_skipped, self._every, self._plan = most_skipped, every, engine.plan
        self._integrity = IntegrityCheck(engine.module, engine.optimizer) if every else None

    def after(self, result: Any, skipped_in_a_row: int, recorder: Any) -> None:
        """Raises StopError when the run should not go on; collective.

        Args:
            result: of the step.
        """
        if self._most_skipped and skipped_in_a_row >= self._most_skipped:
            raise StopError(
                f"step {result.step} was skipped, and {skipped_in_a_row} in a row are enough (--max_skipped_steps): "
                f"{result.refusal}"
            )
        if self._integrity is not None and result.step % self._every == 0:
            begun = time.perf_counter()
            checked = self._integrity.check(result.step)
            seconds = round(time.perf_counter() - begun, 3)
            first = range(0, self._plan.world_size, self._plan.ranks_per_slice)
            ranks = [rank for rank in first for _ in self._plan.owned_by(rank)]
            row = {"step": result.step, "integrity": "passed", "tensors": checked.tensors, "seconds": seconds}
            recorder.integrity(row | {"delta_norms": checked.norms, "outliers": checked.outliers, "ranks": ranks})
            recorder.resume_clock()
