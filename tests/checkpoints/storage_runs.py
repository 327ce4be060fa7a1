"""Storage that fails, at every call of a save, while a tiny model trains; runs inside `ranks.run_ranks`."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from checkpoint_runs import one_step
from engine_runs import whole_weights
from tiny import build

if TYPE_CHECKING:
    from hdpissa.engine.checkpoint.writer import Part

POINTS = (
    "save.make_folder",
    "save.write",
    "save.fsync",
    "save.fsync_folder",
    "save.before_rename",
    "save.before_latest",
)


def train_through_failures(settings: dict, save_dir: str, *, action: str, steps: int, most: int) -> dict[str, Any]:
    """Trains; after every step but the first it tries to save while one call of one rank fails, all calls in turn.

    The calls are found as they come: the nth passage of a point is tried until there is no nth, or `most` have been.

    Returns: every failure's (point, rank, number, message), and the weights at the end.
    """
    from hdpissa.engine import initialize
    from hdpissa.engine.checkpoint.writer import SaveError
    from hdpissa.engine.distributed import faults

    engine = initialize(model=build(None), config=settings)
    world, step = dist.get_world_size(), 0
    one_step(engine, step)
    engine.save_checkpoint(save_dir, save_total_limit=2)
    failures, left = [], []
    for rank in range(world):
        for point in POINTS:
            for nth in range(1, most + 1):
                step += 1
                one_step(engine, step % steps)
                faults._fault, faults._passages = faults.Fault(point, rank, None, action, nth), type(faults._passages)()
                try:
                    engine.save_checkpoint(save_dir, save_total_limit=2)
                except SaveError as error:
                    failures.append((point, rank, nth, str(error)))
                    left += [p.name for p in Path(save_dir).glob(".*.partial") if p.is_dir()]
                    continue
                finally:
                    faults._fault = None
                break
    dist.barrier()
    return {"failures": failures, "left": left, "weights": whole_weights(engine), "steps": step + 1}


def train_without(settings: dict, *, steps: int, length: int) -> dict:
    """The same steps without a save."""
    from hdpissa.engine import initialize

    engine = initialize(model=build(None), config=settings)
    one_step(engine, 0)
    for step in range(1, length):
        one_step(engine, step % steps)
    return whole_weights(engine)


def save_in_background(settings: dict, save_dir: str, *, action: str) -> dict[str, Any]:
    """A save in the background fails on rank 1; the run goes on, is told of it once, and saves again.

    Returns: what each step said of it, what is whole at the end, and the weights of a save while training went on.
    """
    from hdpissa.engine import initialize
    from hdpissa.engine.checkpoint.reader import CheckpointReader
    from hdpissa.engine.distributed import faults
    from hdpissa.engine.files import disk

    engine = initialize(model=build(None), config=settings)
    one_step(engine, 0)
    faults._fault = faults.Fault.parse(f"save.fsync:1:*:{action}")
    engine.save_checkpoint(save_dir, async_save=True)
    if engine.saver._thread is not None:
        engine.saver._thread.join()
    faults._fault = None
    told = [one_step(engine, step).failed_save for step in (1, 2)]
    exact = {t.name: t.shard.read(0, t.own_range(engine.plan).numel).clone() for t in engine.targets}
    changed, write_file = threading.Event(), disk.write_file
    disk.write_file = lambda *args: changed.wait() and write_file(*args)
    folder = engine.save_checkpoint(save_dir, async_save=True)
    one_step(engine, 3)  # changes the weights before any is written
    changed.set()
    engine.wait_for_checkpoint()
    reader = CheckpointReader(folder)
    reader.check()
    ranges = {t.name: t.own_range(engine.plan) for t in engine.targets}
    same = all((reader.weights(n, r.start, r.stop) == exact[n]).all() for n, r in ranges.items())
    return {"told": told, "same": same, "found": sorted(p.name for p in Path(save_dir).iterdir())}


def streams_of_reads(save_dir: str) -> dict[bool, set[str]]:
    """Whether a file is constant → the streams that its parts are read on, by a save in the background."""
    from save_runs import job, start_alone

    saver, current, waited = start_alone(), threading.local(), []

    @contextmanager
    def stream(name):
        current.name = name
        yield

    saver._stream = SimpleNamespace(wait_stream=waited.append)
    torch.cuda.current_stream, torch.cuda.stream = lambda: getattr(current, "name", "training"), stream
    found: dict[bool, set[str]] = {True: set(), False: set()}

    def noted(part: Part, constant: bool) -> Part:
        def read() -> torch.Tensor:
            where = torch.cuda.current_stream()
            found[constant].add("its own" if where is saver._stream and waited == ["training"] else where)
            return part.read()

        return replace(part, read=read)

    whole = job(Path(save_dir), 1)
    files = [replace(file, parts=[noted(part, file.constant) for part in file.parts]) for file in whole.files]
    saver.save(replace(whole, files=files), background=True)
    saver.wait()
    return found
