"""Two hosts with a real network between them: the scripts of launch/nodes/, and what is left when one is cut off."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

import pytest
import torch
from host_runs import NODES, PER_HOST, run_srun, start_hostfile, start_script, timeouts_of_groups
from hosts import obstacle, two_hosts
from launch_runs import flags, make_inputs, read_json, read_metrics, train_here, wait_for
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import ds_settings

STEPS = 4
TIMEOUT = 20  # seconds; of the run that loses a host
WHY_NOT = obstacle()
on_two_hosts = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def inputs(folder):
    return make_inputs(folder / "inputs")


@pytest.fixture(scope="module")
def hosts():
    with two_hosts() as pair:
        yield pair


def arguments(inputs, output, **changes):
    """Constant rate, so that a longer run begins like a shorter one."""
    chosen = {**inputs, "output_dir": str(output), "max_steps": STEPS, "learning_rate": 3e-3, "warmup_ratio": 0}
    chosen |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": 2}
    return chosen | {"max_length": 128, "prompt_template": "none"} | changes


@pytest.fixture(scope="module")
def one_host(folder, inputs):
    """Four ranks on one host."""
    output = folder / "one_host"
    results = run_ranks(4, train_here, flags(arguments(inputs, output)), str(folder / "cache"))
    assert [(r["code"], r["error"]) for r in results] == [(0, None)] * 4, results
    return output


def losses(output):
    steps, _ = read_metrics(output)
    return [row["loss"] for row in steps]


def assert_same_run(output, other):
    """Bit for bit: ranks are one thread each, and gloo adds up in an order that ranks and sizes alone determine."""
    assert losses(output) == losses(other)
    one, two = ([row["eval_loss"] for row in read_metrics(at)[1]] for at in (output, other))
    assert one == two
    one, two = (load_file(at / "model" / "model.safetensors") for at in (output, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert read_json(output / "run_state.json") == {"state": "finished", "step": STEPS, "message": ""}


# --- the same run ----------------------------------------------------------------------------------


@pytest.mark.slow
@on_two_hosts
def test_srun(folder, inputs, hosts, one_host):
    """Rank, hosts and port from Slurm's variables alone."""
    output = folder / "srun"
    results = run_srun(hosts, folder, arguments(inputs, output))
    assert [(r["code"], r["error"]) for r in results] == [(0, None)] * 4, results
    assert_same_run(output, one_host)


@on_two_hosts
def test_torchrun(launched, one_host):
    """Without GLOO_SOCKET_IFNAME, and with host names that nothing resolves."""
    assert_same_run(launched["torchrun"], one_host)


@pytest.mark.slow
@on_two_hosts
def test_deepspeed_hostfile(folder, inputs, hosts, one_host):
    """One command on one host; the launcher starts the other by pdsh, and finds rank 0's address by ssh."""
    place = folder / "hostfile"
    place.mkdir()
    process = start_hostfile(hosts, place, arguments(inputs, place / "out"))
    wait_all([process], 200)
    assert process.returncode == 0, (place / "log").read_text()
    assert_same_run(place / "out", one_host)


# --- the real launchers, and a host that is cut off ------------------------------------------------


@pytest.fixture(scope="module")
def launched(folder, inputs, hosts):
    """The deepspeed launcher, with an output folder for each host, until in mid-run the cable is taken out. While that
    run waits in vain, torchrun does the whole run on the other pair of hosts.

    Returns: "torchrun": its output folder; "cut": of each host the output folder, the log, the exit code and how long
    it went on.
    """
    place, other = folder / "cut", folder / "torchrun"
    place.mkdir()
    other.mkdir()
    with contextlib.ExitStack() as end:
        pair = end.enter_context(two_hosts())
        outputs = [place / host.name for host in pair]
        runs = [arguments(inputs, output, max_steps=100_000, ddp_timeout=TIMEOUT) for output in outputs]
        processes = start_script("deepspeed_no_ssh.sh", pair, place, runs)
        end.callback(kill, processes)
        logs = [place / f"{host.name}.log" for host in pair]
        state = outputs[0] / "run_state.json"
        try:
            wait_for(lambda: state.exists() and read_json(state)["step"] >= STEPS, processes[0])
        except AssertionError as error:
            raise AssertionError("".join(log.read_text() for log in logs)) from error
        pair[1].cut()
        at = time.monotonic()
        processes += start_script("torchrun.sh", hosts, other, [arguments(inputs, other / "out")] * 2)
        ends = wait_all(processes, TIMEOUT + 120)
    codes = [process.returncode for process in processes]
    assert codes[2:] == [0, 0], "".join(log.read_text() for log in other.glob("*.log"))
    told = zip(outputs, [log.read_text() for log in logs], codes[:2], [end - at for end in ends[:2]], strict=True)
    return {"torchrun": other / "out", "cut": list(told)}


def wait_all(processes, seconds):
    """When each ended; infinity for one that had to be killed."""
    ends = [float("inf")] * len(processes)
    over = time.monotonic() + seconds
    while time.monotonic() < over and float("inf") in ends:
        for number, process in enumerate(processes):
            if process.poll() is not None:
                ends[number] = min(ends[number], time.monotonic())
        time.sleep(0.1)
    kill(processes)
    return ends


def kill(processes):
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def cut(launched):
    return launched["cut"]


@on_two_hosts
def test_until_then_it_is_the_same_run(cut, one_host):
    assert losses(cut[0][0])[:STEPS] == losses(one_host)


@on_two_hosts
@pytest.mark.parametrize("side", [0, 1], ids=["host of rank 0", "the other host"])
def test_each_host_ends_in_time_and_says_why(cut, side):
    """Each is, to itself, the survivor: all its ranks say in one line whom they lost, and its run_state.json does."""
    output, log, code, seconds = cut[side]
    assert code not in (0, None), log
    assert seconds < TIMEOUT + 15, log
    lines = [line for line in log.splitlines() if "error: " in line]
    mine, theirs = (range(s * PER_HOST, (s + 1) * PER_HOST) for s in (side, 1 - side))
    lost = f"no answer from ranks {', '.join(map(str, theirs))} on host{'ba'[side]} (10.77.0.{2 - side})"
    for rank in mine:
        (line,) = [line for line in lines if f"rank {rank} on host{'ab'[side]} lost its peers after step" in line]
        assert lost in line
        assert f"--hang_timeout {TIMEOUT} s" in line
    assert "Traceback" not in log
    state = read_json(output / "run_state.json")
    assert state["state"] == "failed"
    assert state["step"] >= STEPS
    assert lost in state["message"]
    assert f"after step {state['step']}:" in state["message"]


@on_two_hosts
def test_the_other_host_leaves_nothing_else(cut):
    """metrics.jsonl and the rest are rank 0's."""
    assert [path.name for path in cut[1][0].iterdir()] == ["run_state.json"]
    assert {"metrics.jsonl", "run.json", "run_state.json"} <= {path.name for path in cut[0][0].iterdir()}


# --- the time-out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hpz", [1, 2])
def test_every_group_has_the_time_out(hpz):
    """DeepSpeed's own groups, in which it gathers, too: they would wait for torch's 30 minutes."""
    settings = ds_settings(zero={"zero_hpz_partition_size": hpz})
    for found in run_ranks(2, timeouts_of_groups, settings, 7):
        assert set(found) == {7.0}
        assert len(found) >= 1 + hpz


# --- the scripts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted(path.name for path in NODES.iterdir() if path.name != "hostfile"))
def test_scripts_are_shell(script):
    assert os.access(NODES / script, os.X_OK)
    done = subprocess.run(["bash", "-n", str(NODES / script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_sbatch_script_calls_srun_here(tmp_path):
    """With a stand-in for srun that prints what it was to start."""
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(NODES.parents[1])}
    line = ["bash", str(NODES / "slurm.sbatch"), "--max_steps", "3"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-4:] == ["-u", "launch/train.py", "--max_steps", "3"]
    assert "--kill-on-bad-exit=1" in done.stdout
