"""Runs that are killed and resumed until they are done, and what they end with against the run that nobody disturbed.

    python tests/kill_runs.py [--runs 60] [--seed 0] [--only launcher]

A tiny Llama on two ranks, twelve steps, a checkpoint after every second one, two of them kept. Each run is disturbed
once, at a seeded moment, in the next of these ways, and then resumed with --resume_from_checkpoint auto:

    SIGKILL to one rank; to both; to the real `deepspeed` launcher and its child, whose ranks then live on;
    SIGTERM to one rank, to both; SIGKILL within a save, at ten points from its first file to the move of `latest`
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from fault_runs import _rank
from launch_runs import command, flags, free_port, make_inputs, read_metrics, start
from ranks import _context
from safetensors.torch import load_file

STEPS, EVERY, RANKS = 12, 2, 2
NO_FAULT = "none:0:0:RAISE"
# point, and the nth passage of it within the save; rank 0 passes all of them
SAVE_POINTS = [
    ("save.write", 1), ("save.write", 5), ("save.fsync", 2), ("save.fsync", 4), ("save.link", 1),
    ("save.before_rename", 1), ("save.after_rename", 1), ("save.before_latest", 1), ("save.before_rename", 2),
    ("save.after_latest", 1),
]  # fmt: skip
SIGNALS = ["kill one", "term one", "kill all", "term all", "launcher"]
WAYS = [*(f"{point}:{nth}" for point, nth in SAVE_POINTS), *SIGNALS]
HOW = {"step_time_s", "tokens_per_second", "peak_memory_bytes"}  # of a row: how it came about


@dataclass(frozen=True)
class Case:
    """Where runs are made: arguments that all share, and the folder of the undisturbed one."""

    folder: Path
    arguments: dict

    def flags(self, output: Path) -> list[str]:
        return flags({**self.arguments, "output_dir": str(output), "resume_from_checkpoint": "auto"})


def make_case(folder: Path) -> Case:
    """Inputs, and a run that nobody disturbs."""
    inputs = make_inputs(folder / "inputs")
    inputs.pop("eval_dataset_name")
    arguments = {**inputs, "max_steps": STEPS, "save_steps": EVERY, "save_total_limit": 2, "learning_rate": 3e-3}
    arguments |= {"per_device_train_batch_size": 2, "max_length": 64, "prompt_template": "none", "hang_timeout": 30}
    case = Case(folder, arguments)
    codes = wait_all(start_ranks(case, folder / "whole"), 300)
    if codes != [0] * RANKS:
        raise RuntimeError(f"the undisturbed run ended with {codes}: {logs(folder / 'whole')}")
    return case


def logs(output: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted(output.parent.glob(f"{output.name}.*.err")))


def start_ranks(case: Case, output: Path, fault: str = NO_FAULT) -> list:
    port = free_port()
    files = [output.parent / f"{output.name}.{rank}.err" for rank in range(RANKS)]
    cache = str(case.folder / "cache")
    workers = [
        _context.Process(target=quiet_rank, args=(rank, RANKS, port, case.flags(output), cache, fault, file))
        for rank, file in enumerate(files)
    ]
    for worker in workers:
        worker.start()
    return workers


def quiet_rank(*args) -> None:
    """`fault_runs._rank` without what it prints."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _rank(*args)


def wait_all(workers: list, seconds: float) -> list[int | None]:
    """Exit codes; None for a rank that had to be killed."""
    end = time.monotonic() + seconds
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
        worker.join()
    return codes


def disturb(case: Case, output: Path, way: str, rng: random.Random) -> None:
    """Starts a run and does to it what `way` says."""
    if way in SIGNALS:
        before = rng.randrange(STEPS - 4)  # steps recorded when it happens
        pause = rng.random() * 0.1
        if way == "launcher":
            kill_launcher(case, output, before, pause)
            return
        workers = start_ranks(case, output)
        wait_for_rows(output, before, lambda: all(w.is_alive() for w in workers))
        time.sleep(pause)
        hit = workers if way.endswith("all") else [rng.choice(workers)]
        for worker in hit:
            os.kill(worker.pid, signal.SIGKILL if way.startswith("kill") else signal.SIGTERM)
    else:
        step = rng.randrange(EVERY * (2 if "link" in way else 1), STEPS + 1, EVERY)
        point, nth = way.split(":")
        rank = rng.choice([0, 1]) if point in ("save.write", "save.fsync") else 0
        if way == "save.fsync:4":
            rank = 0  # from the second save on rank 1 has three files to sync: it links its factors
        workers = start_ranks(case, output, f"{point}:{rank}:{step}:KILL:{nth}")
    wait_all(workers, 120)


def wait_for_rows(output: Path, rows: int, alive) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and alive():
        path = output / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") > rows:
            return
        time.sleep(0.01)


def kill_launcher(case: Case, output: Path, before: int, pause: float) -> None:
    """SIGKILL to `deepspeed` and its child. The ranks live on, and hold the folder until they end or are ended."""
    arguments = {**case.arguments, "output_dir": str(output), "resume_from_checkpoint": "auto"}
    process = start(
        command("deepspeed", arguments), case.folder / "home", output.parent / f"{output.name}.launcher.err"
    )
    wait_for_rows(output, before, lambda: process.poll() is None)
    time.sleep(pause)
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    launchers = [p for p in family if "deepspeed.launcher.launch" in " ".join(p.cmdline())]
    ranks = [p for p in family if "launch/train.py" in " ".join(p.cmdline()) and p not in launchers]
    for p in [*launchers, psutil.Process(process.pid)]:
        p.kill()
    process.wait()
    for p in ranks:  # as long as a second run takes to begin, these would be done
        p.suspend()
    second = wait_all(start_ranks(case, output), 120)
    for p in ranks:
        p.kill()
    psutil.wait_procs(ranks, 30)
    if second != [2] * RANKS:
        raise RuntimeError(f"a second run in a folder in use was not refused but ended with {second}: {logs(output)}")


def resume(case: Case, output: Path) -> list[int | None]:
    return wait_all(start_ranks(case, output), 300)


def differences(case: Case, output: Path) -> list[str]:
    """In what a run is not the undisturbed one; bit for bit."""
    found = []
    whole = load_file(case.folder / "whole" / "model" / "model.safetensors")
    model = load_file(output / "model" / "model.safetensors")
    found += [f"{name} differs" for name in whole if not torch.equal(whole[name], model[name])]
    rows = [[{k: v for k, v in row.items() if k not in HOW} for row in read_metrics(o)[0]] for o in
            (case.folder / "whole", output)]  # fmt: skip
    if rows[0] != rows[1]:
        found.append("metrics.jsonl differs")
    if json.loads((output / "run_state.json").read_text())["state"] != "finished":
        found.append("it does not say that it has finished")
    return found


def one_run(case: Case, number: int, seed: int, way: str) -> str:
    """ "" when the resumed run is the undisturbed one, else what is wrong."""
    rng = random.Random(f"{seed} {number}")
    output = case.folder / f"run-{number}"
    disturb(case, output, way, rng)
    if json.loads((output / "run_state.json").read_text())["state"] == "finished":
        return "it was not disturbed"
    codes = resume(case, output)
    if codes != [0] * RANKS:
        return f"resumed, it ended with {codes}: {logs(output)}"
    return "; ".join(differences(case, output))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=WAYS)
    args = parser.parse_args()
    ways = [args.only] if args.only else WAYS
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(Path(folder))
        good = 0
        for number in range(args.runs):
            begin, way = time.monotonic(), ways[number % len(ways)]
            problem = one_run(case, number, args.seed, way)
            good += not problem
            print(f"{number + 1:>3}  {way:<22} {time.monotonic() - begin:5.1f} s  {problem or 'same'}", flush=True)
    print(f"{good} of {args.runs} runs ended as the undisturbed one, bit for bit")
    return 0 if good == args.runs else 1


if __name__ == "__main__":
    sys.exit(main())
