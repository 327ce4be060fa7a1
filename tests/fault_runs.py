"""launch/train.py on forked ranks with a fault planted on one of them: how each rank ended, when, and what it said."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass
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

    from hdpissa.engine import faults
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
