"""Ranks from the environment of every launcher, and environments that are half set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hdpissa.engine.distributed.launcher import Launch, expand_counts, first_host, read_launch, speaking_rank
from hdpissa.engine.distributed.rank_status import free_port
from hdpissa.engine.errors import ConfigError

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", **MASTER}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MASTER}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
JOB = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]"}
BATCH = {**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "2(x2)"}
STEP = {**JOB, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0"}
STEP |= {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
INTERACTIVE = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
ALONE = Launch("no launcher", 0, 1, 0, 1)
AT = {"master_addr": "10.0.0.1", "master_port": 29501}
SLURM_AT = {"master_addr": "gpu07", "master_port": 10_000 + 17 * 77}

READ = {
    "deepspeed": (DEEPSPEED, Launch("RANK and WORLD_SIZE", 3, 4, 1, 2, **AT)),
    "torchrun": (TORCHRUN, Launch("RANK and WORLD_SIZE", 3, 4, 1, 2, **AT)),
    "torchrun under srun": (
        {**TORCHRUN, **STEP, "SLURM_STEP_NUM_TASKS": "2"},
        Launch("RANK and WORLD_SIZE", 3, 4, 1, 2, **AT),
    ),
    "torchrun of one": ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launch("RANK and WORLD_SIZE", 0, 1, 0, 1)),
    "srun": (STEP, Launch("srun", 3, 4, 1, 2, **SLURM_AT)),
    "srun, master given": ({**STEP, **MASTER}, Launch("srun", 3, 4, 1, 2, **AT)),
    "srun with WORLD_SIZE from the batch script": (
        {**STEP, "WORLD_SIZE": "4"},
        Launch("srun", 3, 4, 1, 2, **SLURM_AT),
    ),
    "srun of less than the job": (
        {**STEP, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4"},
        Launch("srun", 3, 4, 1, 2, **SLURM_AT),
    ),
    "srun, unequal nodes": (
        {**STEP, "SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_LOCALID": "2"},
        Launch("srun", 3, 4, 2, 3, **SLURM_AT),
    ),
    "srun, older variables": (
        {**BATCH, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"},
        Launch("srun", 3, 4, 1, 2, **SLURM_AT),
    ),
    "srun --ntasks-per-node": (
        {**{k: v for k, v in STEP.items() if "PER_NODE" not in k}, "SLURM_NTASKS_PER_NODE": "2"},
        Launch("srun", 3, 4, 1, 2, **SLURM_AT),
    ),
    "salloc's shell": (JOB, ALONE),
    "srun --pty bash": ({**STEP, **INTERACTIVE, "SLURM_NTASKS": "1"}, ALONE),
    "an interactive step of a larger job": ({**JOB, **INTERACTIVE, "SLURM_NTASKS": "4"}, ALONE),
    "sbatch script of one task": ({**BATCH, "SLURM_NTASKS": "1"}, ALONE),
    "mpirun": ({**OPEN_MPI, **MASTER}, Launch("Open MPI", 3, 4, 1, 2, **AT)),
    "mpirun on one host": (
        {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"},
        Launch("Open MPI", 3, 4, 3, 4, "127.0.0.1", 29500),
    ),
    "mpirun in a Slurm job": ({**BATCH, **OPEN_MPI}, Launch("Open MPI", 3, 4, 1, 2, "gpu07", 29500)),
    "nothing": ({}, ALONE),
    "empty variables": ({"RANK": "", "WORLD_SIZE": " "}, ALONE),
}


@pytest.mark.parametrize(("environment", "launch"), READ.values(), ids=READ)
def test_read(environment, launch):
    assert read_launch(environment) == launch


def without(environment, *names):
    return {k: v for k, v in environment.items() if k not in names}


HALF_SET = {  # and the variable that is named
    "RANK alone": ({"RANK": "1"}, "WORLD_SIZE"),
    "WORLD_SIZE alone": ({"WORLD_SIZE": "2"}, "RANK"),
    "WORLD_SIZE against srun": ({**STEP, "WORLD_SIZE": "8"}, "WORLD_SIZE"),
    "no LOCAL_RANK": (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK"),
    "no MASTER_ADDR": (without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR"),
    "no MASTER_PORT": (without(DEEPSPEED, "MASTER_PORT"), "MASTER_PORT"),
    "rank beyond the world": ({**TORCHRUN, "RANK": "4"}, "rank 4"),
    "no world": ({**TORCHRUN, "WORLD_SIZE": "0"}, "rank 3 of 0"),
    "local rank beyond the host": ({**TORCHRUN, "LOCAL_RANK": "2"}, "local rank 2"),
    "a word": ({**TORCHRUN, "RANK": "one"}, "RANK"),
    "negative": ({**TORCHRUN, "RANK": "-1"}, "RANK"),
    "Open MPI, half": ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE"),
    "mpirun on two hosts": (OPEN_MPI, "MASTER_ADDR"),
    "sbatch script without srun": (BATCH, "srun"),
    "srun without hosts": (without(STEP, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "MASTER_ADDR"),
    "srun without local rank": (without(STEP, "SLURM_LOCALID"), "SLURM_LOCALID"),
    "strange counts": ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE"),
}


@pytest.mark.parametrize(("environment", "name"), HALF_SET.values(), ids=HALF_SET)
def test_half_set_environments_are_one_line(environment, name):
    with pytest.raises(ConfigError) as caught:
        read_launch(environment)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [("PMI_RANK", "PMI_SIZE"), ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE")])
def test_other_mpirun_are_refused(names):
    """Else each of their processes would be a run of its own, all writing into one folder; alone they are fine."""
    with pytest.raises(ConfigError, match=names[1]):
        read_launch(dict(zip(names, "12", strict=True)))
    assert read_launch(dict(zip(names, "01", strict=True))).world_size == 1
    assert read_launch(TORCHRUN | dict(zip(names, "12", strict=True))) == read_launch(TORCHRUN)
    assert speaking_rank(dict(zip(names, "12", strict=True))) == "1"


HOSTS = {
    "node1": "node1",
    "node1,node2": "node1",
    "gpu[03-05,9],cpu1": "gpu03",
    "gpu[7,9-11]": "gpu7",
    "rack[1-2]n[05-06]": "rack1n05",
    "a-b-01.cluster,c": "a-b-01.cluster",
    "n[1-2].site": "n1.site",
    "": "",
}


@pytest.mark.parametrize(("nodes", "first"), HOSTS.items())
def test_first_host_of_slurms_list(nodes, first):
    assert first_host(nodes) == first


def test_counts_per_node():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("8") == [8]
    assert expand_counts("8(x") == expand_counts("") == []


def test_consecutive_jobs_and_steps_get_their_own_ports():
    ports = {
        read_launch({**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).master_port
        for job in range(1000, 1020)
        for step in range(10)
    }
    assert len(ports) == 200
    assert all(10_000 <= port < 30_000 for port in ports)


def test_the_rank_that_speaks():
    """Rank 0 tells a person's mistake once, whoever launched it."""
    assert [speaking_rank(env) for env in (TORCHRUN, OPEN_MPI, STEP, BATCH, {})] == ["3", "3", "3", "0", "0"]


def test_no_op_is_probed_for_a_gpu():
    """DeepSpeed's table of ops starts compilers when somebody looks at it. With the accelerator of GPUs, but none."""
    script = """
import torch.distributed as dist
from deepspeed import ops
from deepspeed.accelerator import get_accelerator
from hdpissa.engine.sharding import zero3

dist.init_process_group("gloo")
get_accelerator().set_device = lambda index: None
zero3.init_distributed()
assert get_accelerator().device_name() == "cuda" and dist.is_initialized()
raise SystemExit("__compatible_ops__" in vars(ops))
"""
    one = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    environment = os.environ | one | {"DS_ACCELERATOR": "cuda"}
    assert subprocess.run([sys.executable, "-c", script], env=environment, timeout=120).returncode == 0
