"""Runs a benchmark's function on ranks of its own, through the real `deepspeed` launcher.

    found = ranks.launch(measure, 2, model=folder, slices=8)      # measure(model=…, slices=8) of each rank

The function is at the top of a file of `benchmarks/`; arguments and results are JSON. The launcher starts this file.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from hdpissa.engine.errors import ConfigError, one_line


class FailedRunError(RuntimeError):
    """A run gave no result; the message says why in a line. What it printed is on stderr."""


def launch(function: Callable[..., Any], ranks: int, *, timeout: float = 1800, threads: int = 1, **job: Any) -> list:
    """What `function(**job)` returns on each of `ranks` processes, which have a process group.

    Args:
        timeout: seconds after which the run is killed. threads: of a rank on a CPU, where OMP_NUM_THREADS is not set;
            0 leaves it to the launcher.

    Raises:
        FailedRunError: a rank failed, was killed, or took too long.
        ConfigError: there is no deepspeed command.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed looks for ninja there
    launcher = shutil.which("deepspeed", path=path)
    if launcher is None:
        raise ConfigError("deepspeed: no such command next to this Python or on PATH; install the package")
    environment = ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | os.environ | {"PATH": path}
    with tempfile.TemporaryDirectory() as name:
        record, log = Path(name, "record.json"), Path(name, "log")
        Path(name, "job.json").write_text(json.dumps(job, default=str))
        command = [launcher, "--num_accelerators", str(ranks), "--master_port", str(free_port()), __file__]
        command += ["--function", f"{module_of(function)}:{function.__name__}", "--folder", name]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise FailedRunError(f"not done after {timeout} s") from None
            finally:
                end(process)
        if code == 0 and record.exists():
            return json.loads(record.read_text())
        text, failed = log.read_text(errors="replace"), Path(name, "failed")
        print(text, file=sys.stderr)
        raise FailedRunError(failed.read_text() if failed.exists() else reason(text, code))


def module_of(function: Callable[..., Any]) -> str:
    """By which ranks import a benchmark's function; in the script that is run its own name is `__main__`."""
    file = Path(inspect.getfile(function)).resolve().relative_to(Path(__file__).resolve().parents[1])
    return ".".join(["hdpissa.benchmarks", *file.with_suffix("").parts])


def end(process: subprocess.Popen) -> None:
    """Kills a launcher that still runs, and all that it has started."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


def reason(log: str, code: int) -> str:
    """Of a run that could not say it itself: killed by the system, most likely for memory."""
    killed = re.search(r"(?:return code = |exits? (?:with )?code )-9\b", log)
    return "killed by signal 9: out of memory, most likely" if killed or code == -9 else f"exit code {code}"


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """A rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--function", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    args = parser.parse_args()
    try:
        import torch.distributed as dist

        from hdpissa.engine.sharding import zero3

        zero3.init_distributed()
        module, name = args.function.split(":")
        found = getattr(importlib.import_module(module), name)(**json.loads((args.folder / "job.json").read_text()))
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, found)
        if dist.get_rank() == 0:
            (args.folder / "record.json").write_text(json.dumps(every))
        dist.barrier()
        zero3.shut_down()
    except Exception as error:
        traceback.print_exc()
        failed = args.folder / "failed"
        if not failed.exists():  # the others fail because of the first
            failed.write_text(one_line(error))
        sys.stderr.flush()
        os._exit(1)  # the other ranks wait in a collective; the launcher ends them


if __name__ == "__main__":
    main()
