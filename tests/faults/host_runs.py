"""Runs on the two hosts of tests/faults/hosts.py: by the scripts of launch/nodes/, and as srun would start them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from hosts import Host
from launch_runs import BIN, TRAIN, flags, free_port, start, train_here
from ranks import _context

NODES = TRAIN.parent / "nodes"
PER_HOST = 2


def start_script(script: str, hosts: tuple[Host, Host], folder: Path, runs: list[dict[str, Any]]) -> list:
    """Starts a script of launch/nodes/ on both hosts, as its header says; the outputs go to folder/{host name}.log."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host.address} slots={PER_HOST}\n" for host in hosts))
    said = {"HOSTFILE": hostfile, "NODES": len(hosts), "PROCESSES": PER_HOST, "MASTER_ADDR": hosts[0].address}
    said |= {"MASTER_PORT": free_port(), "PATH": f"{BIN}:{os.environ['PATH']}"}
    started = []
    for number, (host, run) in enumerate(zip(hosts, runs, strict=True)):
        variables = [f"{name}={value}" for name, value in (said | {"NODE_RANK": number}).items()]
        line = host.run("env", *variables, str(NODES / script), *flags(run))
        started.append(start(line, folder.parent / "home", folder / f"{host.name}.log"))
    return started


SSH = """#!{python}
import subprocess, sys
hosts = {hosts!r}
words = sys.argv[1:]
if words[0] == "-o":
    words = words[2:]
sys.exit(subprocess.call([*hosts[words[0]], "sh", "-c", " ".join(words[1:])]))
"""
PDSH = """#!{python}
import subprocess, sys
hosts = {hosts!r}
at = sys.argv.index("-w")
names, command = sys.argv[at + 1].split(","), " ".join(sys.argv[at + 2 :])
running = [subprocess.Popen([*hosts[name], "sh", "-c", command.replace("%n", str(n))]) for n, name in enumerate(names)]
sys.exit(max(process.wait() for process in running))
"""


def start_hostfile(hosts: tuple[Host, Host], folder: Path, run: dict[str, Any]) -> Any:
    """launch/nodes/deepspeed.sh, started once; the launcher reaches both hosts by pdsh and ssh.

    There is no ssh server here, so both are stand-ins that enter the host in question; what they are asked to run, and
    how, is DeepSpeed's own.
    """
    (folder / "bin").mkdir()
    ways = {host.address: host.run() for host in hosts}
    for name, text in (("ssh", SSH), ("pdsh", PDSH)):
        file = folder / "bin" / name
        file.write_text(text.format(python=sys.executable, hosts=ways))
        file.chmod(0o755)
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host.address} slots={PER_HOST}\n" for host in hosts))
    said = {"HOSTFILE": hostfile, "MASTER_PORT": free_port(), "PATH": f"{folder}/bin:{BIN}:{os.environ['PATH']}"}
    line = ["env", *(f"{name}={value}" for name, value in said.items()), str(NODES / "deepspeed.sh"), *flags(run)]
    return start(line, folder.parent / "home", folder / "log")


def slurm_environment(hosts: tuple[Host, Host], rank: int) -> dict[str, str]:
    """What srun gives to a task; the names are addresses here, because nothing resolves these hosts' names."""
    nodes = ",".join(host.address for host in hosts)
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": nodes}
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": nodes}
    task = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % PER_HOST, "SLURM_NODEID": rank // PER_HOST}
    return job | step | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"} | {name: str(value) for name, value in task.items()}


def run_srun(hosts: tuple[Host, Host], folder: Path, run: dict[str, Any], timeout: float = 200) -> list[dict]:
    """Four tasks of one srun, forked instead of started, which saves their imports; what `train_here` returns."""
    files = [folder / f"task{rank}.json" for rank in range(len(hosts) * PER_HOST)]
    job = slurm_environment(hosts, 0)["SLURM_JOB_ID"]
    environments = [slurm_environment(hosts, rank) | {"SLURM_JOB_ID": job} for rank in range(len(files))]
    tasks = [
        _context.Process(target=_task, args=(hosts[rank // PER_HOST], environments[rank], flags(run), folder, file))
        for rank, file in enumerate(files)
    ]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join(timeout)
    for task in tasks:
        task.kill()
        task.join()
    return [json.loads(file.read_text()) for file in files]


def _task(host: Host, environment: dict[str, str], argv: list[str], folder: Path, file: Path) -> None:
    """One rank.

    A fork has read OMP_NUM_THREADS long ago, so the one thread has to be asked for: with two, products add up in
    another order (a loss of 6.106950879 in place of 6.106950760), and eight threads on two cores wait for each other.
    """
    import torch

    host.enter()
    os.environ.update(environment, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    file.write_text(json.dumps(train_here(argv, str(folder / "cache"))))
    os._exit(0)


def timeouts_of_groups(settings, timeout_s: float) -> list[float]:
    """Seconds of every process group that there is once the engine stands."""
    import torch
    import torch.distributed as dist
    from tiny import build

    from hdpissa.engine import initialize
    from hdpissa.engine.sharding import zero3

    zero3.init_distributed(timeout_s)
    initialize(model=build(), config=settings)
    groups = dist.distributed_c10d._world.pg_map
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
