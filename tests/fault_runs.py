"""launch/train.py on forked ranks with a fault planted on one of them: how each rank ended, when, and what it said."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from launch_runs import free_port, prepare_process
from ranks import _context


@dataclass(frozen=True)
class Ended:
    """Of one rank: exit code, None where it had to be killed; what it wrote to standard error; when it ended."""

    code: int | None
    stderr: str
    at: float

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


def run_with_fault(world_size: int, argv: list[str], cache: str, fault: str, timeout: float = 120) -> list[Ended]:
    """The ranks' ends, in rank order. A rank that the fault stops is killed when all others have ended."""
    _, bad, _, action, *_ = fault.split(":")
    awaited = {rank for rank in range(world_size) if action not in ("STOP", "GIL") or rank != int(bad)}
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{rank}.err") for rank in range(world_size)]
        workers = [
            _context.Process(target=_rank, args=(rank, world_size, port, argv, cache, fault, file))
            for rank, file in enumerate(files)
        ]
        for worker in workers:
            worker.start()
        ends: dict[int, float] = {}
        over = time.monotonic() + timeout
        while not awaited <= ends.keys() and time.monotonic() < over:
            for rank, worker in enumerate(workers):
                if rank not in ends and not worker.is_alive():
                    ends[rank] = time.monotonic()
            time.sleep(0.05)
        for worker in workers:
            worker.kill()
            worker.join()
        return [
            Ended(worker.exitcode if rank in ends else None, file.read_text(), ends.get(rank, float("inf")))
            for rank, (worker, file) in enumerate(zip(workers, files, strict=True))
        ]


def _rank(rank: int, world_size: int, port: int, argv: list[str], cache: str, fault: str, file: Path) -> None:
    import torch

    from hdpissa.engine.distributed import faults
    from hdpissa.launch import train

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    faults._fault = faults.Fault.parse(fault)
    prepare_process(cache)
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 2)
    code = 99
    try:
        code = train.run(argv)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(code)


# --- inside `ranks.run_ranks` ----------------------------------------------------------------------


def skip_one(settings: dict, fault: str, steps: int):
    """Trains a tiny Llama with a fault; (results, this rank's state before each step and after the last, counts)."""
    from tiny import build, tiny_batch

    from hdpissa.engine import initialize
    from hdpissa.engine.distributed import faults, heartbeat

    faults._fault = faults.Fault.parse(fault)
    engine = initialize(model=build({}), config=settings, lr=1e-3)
    results, states = [], [_state(engine)]
    for step in range(steps):
        heartbeat.at_step(step + 1)
        for slice_id, micro in engine.plan.schedule(engine.gradient_accumulation_steps()):
            engine.backward(engine(**tiny_batch(step, slice_id, micro)).loss)
            result = engine.step()
        results.append(replace(result, loss=0.0, grad_norm=0.0, bytes_sent=0))  # a nan is not equal to itself
        states.append(_state(engine))
    return results, states, (engine.global_steps, engine.skipped_steps, engine.skipped_in_a_row)


def _state(engine) -> dict:
    import torch

    store = engine.optimizer.store
    state = {t.name: t.shard.read(0, t.own_range(engine.plan).numel).clone() for t in engine.targets}
    state |= {name: getattr(store, name).clone() for name in ("exp_avg", "exp_avg_sq", "delta_sum")}
    return state | {"t": torch.tensor(engine.optimizer.updates)}


def corrupt(settings: dict, cases: list[tuple[str, int]], *, steps: int = 2):
    """Trains, then flips one bit on one rank before a check, and back before the next, for every (point, rank).

    Returns: what a check of the sound run says; per case the StopError's message or None, and whether the next check
    passed again.
    """
    from tiny import build, tiny_batch

    from hdpissa.engine import initialize
    from hdpissa.engine.distributed import faults, heartbeat
    from hdpissa.engine.errors import StopError
    from hdpissa.engine.health.integrity import IntegrityCheck

    net = build({})
    net.register_buffer("scale", torch_arange())
    engine = initialize(model=net, config=settings, lr=1e-3)
    guard = IntegrityCheck(engine.module, engine.optimizer)
    for step in range(steps):
        for slice_id, micro in engine.plan.schedule(engine.gradient_accumulation_steps()):
            engine.backward(engine(**tiny_batch(step, slice_id, micro)).loss)
            engine.step()
    sound = guard.check(steps)

    def outcome() -> str | None:
        try:
            guard.check(steps)
        except StopError as error:
            return str(error)
        return None

    found = []
    for number, (point, rank) in enumerate(cases):
        faults._fault = faults.Fault.parse(f"{point}:{rank}:*:FLIP")
        rate = engine.optimizer.param_groups[0]["lr"]
        heartbeat.at_step(2 * number + 1)
        message = outcome()
        if point == "memory.lr":
            faults._fault = None
            engine.optimizer.param_groups[0]["lr"] = rate
        heartbeat.at_step(2 * number + 2)
        found.append((message, outcome() is None))
    return sound, found


def torch_arange():
    import torch

    return torch.arange(5.0)
