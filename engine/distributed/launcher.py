"""Which rank this process is, read from the environment of whatever started it.

In this order, the first that has spoken wins: deepspeed and torchrun (`RANK`, `WORLD_SIZE`), Open MPI
(`OMPI_COMM_WORLD_*`), srun (`SLURM_*` of a job step); else a plain process, rank 0 of 1. torchrun under srun is
torchrun's: Slurm then counts the torchruns. An environment that is half set or contradicts itself is refused, because
ranks that believe different things wait for each other until the time-out.

Pure: reads a mapping, changes nothing, knows neither torch nor DeepSpeed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError

FIRST_PORT, PORTS = 10_000, 20_000  # below the ports that Linux hands out by itself (32768 and up)


@dataclass(frozen=True)
class Launch:
    """A process's place in a run.

    Attributes:
        launcher: who started it, in words.
        rank, world_size: among all processes. local_rank, local_world_size: among those of its host.
        master_addr, master_port: where rank 0 listens; None where a lone process needs neither.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str | None = None
    master_port: int | None = None


def read_launch(environment: Mapping[str, str]) -> Launch:
    """The place of the process with this environment.

    Raises:
        ConfigError: half-set or contradictory variables, in one line.
    """
    env = {name: value.strip() for name, value in environment.items() if value.strip()}
    if "RANK" in env and "WORLD_SIZE" in env:
        launch = _from_torch(env)
    elif "OMPI_COMM_WORLD_RANK" in env:
        launch = _from_open_mpi(env)
    elif _slurm_tasks(env) > 1:
        launch = _from_slurm(env)
    else:
        _refuse_other_mpi(env)
        launch = Launch("no launcher", 0, 1, 0, 1)
    for name, ours in (("RANK", launch.rank), ("WORLD_SIZE", launch.world_size)):
        if name in env and _number(env, name) != ours:
            other = "WORLD_SIZE" if name == "RANK" else "RANK"
            raise ConfigError(
                f"environment: {name} is {env[name]} without {other}, and {launch.launcher} says {ours}; set both or "
                f"neither"
            )
    _check(launch)
    return launch


def speaking_rank(environment: Mapping[str, str]) -> str:
    """The rank as some launcher gives it, "0" where none does; for messages about an environment that is refused."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK", "MV2_COMM_WORLD_RANK")
    return next((environment[name] for name in names if environment.get(name)), "0")


def _check(launch: Launch) -> None:
    rank, world, local, here = launch.rank, launch.world_size, launch.local_rank, launch.local_world_size
    if not (world >= 1 and 0 <= rank < world):
        raise ConfigError(f"environment: {launch.launcher} says rank {rank} of {world}: must be from 0 to {world - 1}")
    if not (1 <= here <= world and 0 <= local < here):
        raise ConfigError(
            f"environment: {launch.launcher} says local rank {local} of {here} processes on this host, and {world} in "
            f"all; set LOCAL_RANK and LOCAL_WORLD_SIZE rightly, or leave them to the launcher"
        )
    if world > 1 and (launch.master_addr is None or launch.master_port is None):
        name = "MASTER_ADDR" if launch.master_addr is None else "MASTER_PORT"
        raise ConfigError(
            f"environment: {launch.launcher} says rank {rank} of {world}, but {name} is not set; set it on every rank "
            f"to the {'host of rank 0' if name == 'MASTER_ADDR' else 'same free port'}"
        )


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise ConfigError(f"environment: {name} is not set, but others of its launcher are; start the run anew")
    if not re.fullmatch(r"\d+", text):
        raise ConfigError(f"environment: {name} is {text!r}: must be a whole number of at least 0; correct or unset it")
    return int(text)


def _master(env: Mapping[str, str], addr: str | None = None, port: int | None = None) -> tuple[str | None, int | None]:
    """MASTER_ADDR and MASTER_PORT where they are set, else the given ones."""
    return env.get("MASTER_ADDR", addr), _number(env, "MASTER_PORT") if "MASTER_PORT" in env else port


# --- deepspeed, torchrun ---------------------------------------------------------------------------


def _from_torch(env: Mapping[str, str]) -> Launch:
    rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if world > 1 and "LOCAL_RANK" not in env:
        raise ConfigError(
            f"environment: RANK is {rank} and WORLD_SIZE {world}, but LOCAL_RANK is not set; set it to the process's "
            f"number on its host, from 0"
        )
    local = _number(env, "LOCAL_RANK", 0)
    here = _number(env, "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE", world)  # deepspeed: _SIZE
    return Launch("RANK and WORLD_SIZE", rank, world, local, here, *_master(env))


# --- Open MPI --------------------------------------------------------------------------------------


def _from_open_mpi(env: Mapping[str, str]) -> Launch:
    rank, world = _number(env, "OMPI_COMM_WORLD_RANK"), _number(env, "OMPI_COMM_WORLD_SIZE")
    local, here = _number(env, "OMPI_COMM_WORLD_LOCAL_RANK"), _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE")
    first = "127.0.0.1" if here == world else first_host(env.get("SLURM_JOB_NODELIST", "")) or None
    return Launch("Open MPI", rank, world, local, here, *_master(env, first, 29500))


def _refuse_other_mpi(env: Mapping[str, str]) -> None:
    """MPICH, Intel MPI, MVAPICH: without this, each of their processes would take itself for a run of its own."""
    for name in ("PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if _number(env, name, 1) > 1:
            raise ConfigError(
                f"environment: {name} is {env[name]}, of an mpirun other than Open MPI's; set RANK, WORLD_SIZE, "
                f"LOCAL_RANK, MASTER_ADDR and MASTER_PORT on every process, or use deepspeed, torchrun or srun"
            )


# --- srun ------------------------------------------------------------------------------------------

_STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")  # set by srun alone


def _slurm_tasks(env: Mapping[str, str]) -> int:
    """Tasks of the job step that this process is one of; 1 outside a step.

    The shell of `salloc` knows how many tasks the job may have, but has no SLURM_PROCID. That of `srun --pty` is a step
    of one task. The script of `sbatch` has a SLURM_PROCID of 0 and is no step.
    """
    if "SLURM_PROCID" not in env:
        return 1
    tasks = _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS", 1)
    if tasks > 1 and env["SLURM_PROCID"] == "0" and not any(name in env for name in _STEP):
        raise ConfigError(
            f"environment: SLURM_NTASKS is {tasks}, but srun did not start this process; put srun before the command, "
            f"or unset SLURM_NTASKS for a run of one process"
        )
    return tasks


def _from_slurm(env: Mapping[str, str]) -> Launch:
    rank, tasks = _number(env, "SLURM_PROCID"), _slurm_tasks(env)
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    # two steps of a job may share a host, and so may two jobs that come one after the other
    job, step = _number(env, "SLURM_JOB_ID", 0), _number(env, "SLURM_STEP_ID", 0)
    port = FIRST_PORT + (17 * job + step) % PORTS
    local, here = _number(env, "SLURM_LOCALID"), _slurm_tasks_here(env, tasks)
    return Launch("srun", rank, tasks, local, here, *_master(env, first_host(hosts) or None, port))


def _slurm_tasks_here(env: Mapping[str, str], tasks: int) -> int:
    """Tasks on this host: of the step, by `--ntasks-per-node`, of the job; all where nothing is said."""
    node, nodes = _number(env, "SLURM_NODEID", 0), _number(env, "SLURM_NNODES", 1)
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if name in env:
            counts = expand_counts(env[name])
            if not counts:
                raise ConfigError(f"environment: {name} is {env[name]!r}: must be like 2(x3),1; correct or unset it")
            return counts[min(node, len(counts) - 1)]
    return -(-tasks // nodes)


def expand_counts(text: str) -> list[int]:
    """Slurm's counts per node, "2(x3),1" → [2, 2, 2, 1]; empty when it is no such text."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            return []
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """The first name of Slurm's host list, "gpu[03-05,9],cpu1" → "gpu03"; what `scontrol show hostnames` would say."""
    outside = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    first = outside[0] if outside else ""
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first).strip()
