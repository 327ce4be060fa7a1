"""What a run leaves to look at: report.html and training_loss.png."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hdpissa.engine.distributed import heartbeat
from hdpissa.engine.errors import one_line
from hdpissa.engine.export import spectra
from hdpissa.engine.files import atomic
from hdpissa.launch.reporting import page as report

logger = logging.getLogger(__name__)
MOST_WEIGHTS = 21  # three of each of Llama's seven kinds


class RunPictures(TrainerCallback):
    """Draws a run when it ends. Give it to the trainer's constructor: the run is then recorded as finished after it.

    Failures are warnings. Spectra are collective; a run that is being stopped has no time for them.

    Args:
        run: its attribute `trainer` must be set when training begins.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 0:
            for name in (report.PAGE, report.LOSS, report.SPECTRA):  # of an earlier run
                (Path(args.output_dir) / name).unlink(missing_ok=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, folder, found = self._run.trainer, Path(args.output_dir), None
        if not trainer.preempted:
            found = spectra.measure(trainer.engine.module, trainer.engine.optimizer.store, most=MOST_WEIGHTS)
        if args.process_index:
            return
        try:
            with heartbeat.single_rank("report"):
                if found is not None:
                    _warn(found)
                    atomic.write_json(folder / report.SPECTRA, found)
                report.write_report(folder, "preempted" if trainer.preempted else "finished")
        except Exception as error:
            logger.warning("no report: %s; the run is complete", one_line(error))


def _warn(found: dict[str, Any]) -> None:
    if found["problem"]:
        logger.warning("spectra of %d weights, then %s", len(found["weights"]), found["problem"])
    if found["left_out"]:
        logger.warning("no spectra of %s: no time or memory for them", ", ".join(found["left_out"]))
