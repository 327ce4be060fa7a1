"""run.json: what a run was, and what is needed to repeat it."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hdpissa.launch.train_checks import Job


def describe_run(args: Any, engine: Any, job: Job, resumed: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is needed to know, and to repeat, what was run.

    Args:
        resumed: after which steps it went on with other arguments.
    """
    from importlib.metadata import version

    from hdpissa.engine import zero3
    from hdpissa.launch.train_data import describe_rows

    plan = engine.plan
    return {
        "arguments": asdict(args),
        "local": local_names(args),
        "resumed": resumed,
        "ds_config": job.ds,
        "world_size": plan.world_size,
        "slices": plan.slices,
        "targets": len(engine.targets),
        "modules_to_save": engine.optimizer.beside.numels if engine.optimizer.beside else {},
        "target_modules": sorted({t.name.rsplit(".", 1)[-1] for t in engine.targets}),
        "total_steps": job.total_steps,
        "steps_per_epoch": job.data.steps_per_epoch,
        "rows": describe_rows(job.rows, job.data),
        "init": asdict(engine.init_report),
        "exchange": asdict(engine.exchange_plan()),
        "memory_bytes": engine.memory_bytes(),
        "device": zero3.accelerator_name(),
        "versions": {name: version(name) for name in ("hdpissa", "torch", "deepspeed", "transformers", "datasets")},
        "git_revision": git_revision(),
    }


def local_names(args: Any) -> list[str]:
    """Of the model and the data those names that are paths here: a card must not take them for names on the hub."""
    from hdpissa.engine.data_sources import parse_sources

    texts = [text for text in (args.dataset_name, args.eval_dataset_name) if text]
    names = {args.model_name_or_path, *(source.name for text in texts for source in parse_sources(text))}
    return sorted(name for name in names if os.path.exists(os.path.expanduser(name)))


def git_revision() -> str | None:
    """Commit of this code, None when it was installed without its repository."""
    import subprocess

    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return found.stdout.strip() or None
