"""After every step: a look at the slices, and is there a reason not to go on?

Reasons are steps that are skipped again and again, and corrupted memory. Every rank comes to the same answer, so all of
them raise. Ranks that hang or die are not seen here but by
engine/watch.py.
"""

from __future__ import annotations

import time
from typing import Any

from hdpissa.engine.errors import StopError


class Guard:
    """Made when all weights are in place.

    Args:
        args: max_skipped_steps, skipped steps in a row that end the run; integrity_steps, optimizer steps between two
            checks for silent corruption; slice_metrics_steps, between two looks at the slices. 0: never.
    """

    def __init__(self, engine: Any, args: Any) -> None:
        from hdpissa.engine.integrity import IntegrityCheck
        from hdpissa.engine.slice_figures import SliceFigures

        self._most_skipped, self._every, self._plan = args.max_skipped_steps, args.integrity_steps, engine.plan
        self._integrity = IntegrityCheck(engine.module, engine.optimizer) if self._every else None
        self._slices = None
        if args.slice_metrics_steps:
            self._slices = SliceFigures(
                engine.optimizer,
                every=args.slice_metrics_steps,
                patience=args.silent_slice_steps,
                start=engine.global_steps,
            )

    def after(self, result: Any, skipped_in_a_row: int, recorder: Any) -> None:
        """Raises StopError when the run should not go on; collective.

        Args:
            result: of the step.
        """
        if self._slices is not None:
            self._slices.after(result, recorder)
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
