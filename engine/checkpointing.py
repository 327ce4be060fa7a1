"""Saving and resuming a run: methods of `HDPissaEngine`, each of them a function of the engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import directory, state
from .checkpoint.manifest import Kind
from .checkpoint.reader import CheckpointReader
from .checkpoint.writer import Job, SaveError
from .distributed import heartbeat
from .export.from_engine import measure_sums
from .sharding import zero3

if TYPE_CHECKING:
    from .engine import HDPissaEngine

logger = logging.getLogger(__name__)


def save_checkpoint(
    engine: HDPissaEngine,
    save_dir: str | Path,
    tag: str | None = None,
    client_state: dict[str, Any] | None = None,
    *,
    kind: Kind = "full",
    async_save: bool = False,
    save_total_limit: int | None = None,
    best: bool = False,
    extra_files: Mapping[str, str] | None = None,
) -> Path:
    """Saves the run as `save_dir`/`tag` and points `save_dir`/latest to it; collective, between two steps.

    Args:
        tag: default "checkpoint-N" after N steps.
        client_state: JSON-serialisable; `load_checkpoint` returns it.
        kind: "full", exact; or "small", without weights (see `checkpoint.state`).
        async_save: returns when the state is copied to host memory. A failure then shows in
            `StepResult.failed_save`, or is raised by `wait_for_checkpoint`; call that before the end.
        save_total_limit: how many `checkpoint-N` to keep; None: all.
        best: it is the best so far: `save_dir`/best names it, and it is kept whatever the limit.
        extra_files: name (`….json`) → text of files that belong to the checkpoint; rank 0's are written.

    Raises:
        SaveError: on all ranks alike; earlier checkpoints are intact.
        RuntimeError: gradients are accumulated that a checkpoint would lose.
    """
    if engine.micro_batches:
        raise RuntimeError(f"save_checkpoint after {engine.micro_batches} micro-batches: save right after a step")
    heartbeat.beat("save", slow=True)
    engine.check_weights()
    folder = Path(save_dir) / directory.check_tag(tag or f"checkpoint-{engine.global_steps}")
    optimizer, residual = engine.optimizer, None
    if kind == "small" and not state.sums_are_exact(optimizer):
        residual = measure_sums(engine.module, optimizer.store, updates=optimizer.updates)[0]
    files = state.own_files(kind, optimizer, extra_files or {})
    manifest = state.make_manifest(
        kind,
        optimizer,
        engine.base,
        steps=(engine.global_steps, engine.skipped_steps, engine.skipped_in_a_row),
        report=engine.init_report,
        residual=residual.overall if residual else None,
        client_state=client_state or {},
        extra_files=list(extra_files or ()),
    )
    engine.saver.save(Job(folder, files, manifest, save_total_limit, best), background=async_save)
    heartbeat.beat("saved")
    return folder


def wait_for_checkpoint(engine: HDPissaEngine) -> None:
    """Waits until no checkpoint is being saved; raises SaveError when one has failed."""
    heartbeat.beat("save.wait", slow=True)
    engine.saver.wait()
    heartbeat.beat("saved")


def finish_failed_save(engine: HDPissaEngine) -> str:
    """The message of a save that has failed in the background, empty if none has; all ranks call it together."""
    try:
        engine.saver.wait()
    except SaveError as error:
        return str(error)
    return ""


def load_checkpoint(engine: HDPissaEngine, load_dir: str | Path, tag: str | None = None) -> tuple[Path, dict[str, Any]]:
    """Continues where a checkpoint was saved, at any number of ranks; collective. On an error nothing has changed.

    Args:
        load_dir: a checkpoint, or the folder of several: then `tag`, or what `latest` names.

    Returns: (the checkpoint's folder, its client_state).

    Raises:
        CheckpointError: on all ranks alike: damaged, or of another run.
    """
    reader = resume_from(engine, Path(load_dir) / directory.check_tag(tag) if tag else Path(load_dir))
    return reader.folder, reader.manifest.client_state


def resume_from(engine: HDPissaEngine, source: CheckpointReader | str | Path) -> CheckpointReader:
    """`load_checkpoint` from a folder, or from a checkpoint that is already open; returns the reader, closed."""
    if failed := finish_failed_save(engine):  # files that are being saved are read until then
        logger.warning("%s", failed)
    reader = source if isinstance(source, CheckpointReader) else state.open_checkpoint(source)
    optimizer = engine.optimizer
    store = optimizer.store
    numels = optimizer.modules_to_save.numels if optimizer.modules_to_save else {}
    state.refuse_others(reader, store, optimizer.rule, engine.base, numels)
    state.refuse_changed(reader, optimizer)
    engine.init_report = state.fill_factors(reader, store, optimizer.exchange)
    restore(engine, reader)
    return reader


def restore(engine: HDPissaEngine, reader: CheckpointReader) -> None:
    """Takes the state of a checkpoint that fits and whose factors are in place; collective."""
    zero3.release_gathered(engine.ds)
    state.restore(reader, engine.optimizer)
    zero3.fence()
    engine.zero_grad()
    manifest = reader.manifest
    engine.set_progress(manifest.step, manifest.skipped_steps, manifest.skipped_in_a_row)
    engine.saver.adopt(reader.folder, manifest.files)
    reader.close()
