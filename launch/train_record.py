"""The output folder of a run: its recorder, and what becomes of an earlier run's record there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hdpissa.launch.options_reporting import reporters
from hdpissa.launch.train_checks import Job
from hdpissa.launch.train_lock import lock_folder


def make_recorder(args: Any, job: Job, reader: Any) -> Any:
    """Makes the output folder, and run_state.json; of an earlier run there nothing else is touched."""
    from hdpissa.engine import zero3
    from hdpissa.engine.recorder import Recorder
    from hdpissa.engine.reporters import make_reporters

    folder, start = Path(args.output_dir), reader.manifest.step if reader else 0
    lock_folder(folder, job.plan.rank)
    earlier = state_of_the_run_in(folder)
    zero3.barrier()  # all have read it
    if job.plan.rank:  # where hosts do not share the folder nobody else does this
        (folder / "run_state.json").unlink(missing_ok=True)
    zero3.barrier()  # rank 0 writes after it
    names = reporters(args) if job.plan.rank == 0 else []
    recorder = Recorder(
        folder,
        total_steps=job.total_steps,
        weights=job.weights,
        device_name=zero3.accelerator_name(),
        devices=job.plan.world_size,
        rank=job.plan.rank,
        reporters=make_reporters(names, folder, logging_dir=args.logging_dir, run_name=args.run_name),
        bar=not args.disable_tqdm,
        earlier=earlier,
    )
    recorder.state("running", start)
    return recorder


def state_of_the_run_in(folder: Path) -> dict[str, Any] | None:
    """run_state.json of a run that has described itself; None where there is none."""
    try:
        return dict(json.loads((folder / "run_state.json").read_text())) if (folder / "run.json").exists() else None
    except (OSError, ValueError, TypeError):
        return None


def take_over(args: Any, job: Job, recorder: Any, reader: Any) -> None:
    """Makes the folder this run's: of an earlier one only the steps before the checkpoint count any more.

    Not before all of the checkpoint fits: what a person got wrong must not cost them a finished run's record.
    """
    from hdpissa.engine import folders, pulse
    from hdpissa.engine.metrics import keep_rows

    folder, start = Path(args.output_dir), reader.manifest.step if reader else 0
    goes_on = reader is not None and reader.folder.parent.resolve() == folder.resolve()
    recorder.begin()
    if job.plan.rank:
        return
    with pulse.alone("folder"):
        (folder / "run.json").unlink(missing_ok=True)
        keep_rows(folder / "metrics.jsonl", start)
        if (folder / "samples.jsonl").exists():
            keep_rows(folder / "samples.jsonl", start)
        if args.overwrite_output_dir and not goes_on:  # also when the run goes on from another folder
            folders.discard(folder)
