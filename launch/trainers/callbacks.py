"""Callbacks of every step: stop on signals, watch skipped steps and the slices' figures."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainerCallback

from hdpissa.engine.distributed import heartbeat
from hdpissa.engine.errors import StopError
from hdpissa.engine.health.integrity import IntegrityCheck
from hdpissa.engine.health.slice_figures import SliceFigures

from .arguments import option

logger = logging.getLogger(__name__)


class StopOnSignals(TrainerCallback):
    """Lets a run end after the step in which any rank was asked to stop.

    Schedulers send a signal some time before they kill (Slurm: `--signal=USR1@300`). The ranks agree on it in the
    step's own vote, so that all of them save the same step.

    Args:
        trainer: `trainer.preempted` becomes true.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it the signals do not end the process."""
        if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
            yield
            return
        former = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _ask(self, *_: Any) -> None:
        if self._trainer.engine is not None:
            self._trainer.engine.request_stop()
        else:
            raise SystemExit(143)  # nothing is lost yet

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        step = self._trainer.engine.last_step
        if step is not None and step.interrupted and state.global_step < state.max_steps:
            self._trainer.preempted = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # it may take longer than there is time
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self._trainer.preempted:  # all of that has been decided after the step
            control.should_evaluate = control.should_save = False
        return control


def keep_from_ending_the_run(reporter: TrainerCallback) -> None:
    """Drops a reporter with a warning at its first error, such as an unreachable server or a full disk."""
    failed: list[BaseException] = []

    def careful(report: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if failed:
                return None
            with heartbeat.single_rank("report"):
                try:
                    return report(*args, **kwargs)
                except Exception as error:
                    failed.append(error)
                    logger.warning("%s is dropped: %s: %s", type(reporter).__name__, type(error).__name__, error)
                    return None

        return call

    for name in dir(TrainerCallback):
        if name.startswith("on_"):
            setattr(reporter, name, careful(getattr(reporter, name)))


class SliceGuard(TrainerCallback):
    """Ends runs that skip too many steps in a row; logs norms per slice and checks integrity every so many steps.

    Raises StopError on all ranks where continuing makes no sense.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._integrity: IntegrityCheck | None = None
        self._figures: SliceFigures | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine, every = self._trainer.engine, option(args, "slice_metrics_steps")
        self._every = option(args, "integrity_steps")
        self._integrity = IntegrityCheck(engine.module, engine.optimizer) if self._every else None
        if every:
            patience = option(args, "silent_slice_steps")
            self._figures = SliceFigures(engine.optimizer, every=every, patience=patience, start=state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends a run whose steps are skipped again and again; the last of them has its row by now."""
        engine, most = self._trainer.engine, option(args, "max_skipped_steps")
        if most and engine.skipped_in_a_row >= most:
            raise StopError(
                f"step {state.global_step} was skipped, and {engine.skipped_in_a_row} in a row are enough "
                f"(max_skipped_steps): {engine.last_step.refusal}"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, record = self._trainer.engine.last_step, self._trainer.run_record
        if self._figures is not None and (found := self._figures.after(step)) is not None:
            row, warnings = found
            record.figures(row)
            for line in warnings:
                record.say(line)
        if self._integrity is not None and step.step % self._every == 0:
            record.integrity(self._integrity.check(step.step), step.step)
