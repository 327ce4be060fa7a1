"""How fast is a whole training step, beside PEFT, full fine-tuning, a frozen base and the published algorithm, and how
does it scale?

    python benchmarks/step/throughput.py [--num_accelerators 1 2 4 8]
        [--methods hd_pissa lora pissa full frozen reference]
        [--model FOLDER|HUB NAME|SHAPE] [--dtype fp32|bf16] [--rounds N] …

Every method at every number of processes is a run of its own through the real `deepspeed` launcher
(throughput_worker.py), on the same rows of random tokens. What a rank gets stays the same when there are more of
them. A round runs all methods one after another, each round in another order; ratios are taken within a round, and
their median counts. A method that fails has a row with the reason.

Without a GPU the defaults are a tiny model on 2 processes; most of the time is the start of the processes. With GPUs
they are a Llama-2-7B of random weights in bf16 on 1, 2, 4, … GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.step import method_models, throughput_table, throughput_work
from hdpissa.benchmarks.step.methods import DTYPES, METHODS, Setting
from hdpissa.engine.errors import ConfigError

WORKER = Path(__file__).parent / "throughput_worker.py"
SMALL = {"model": "tiny", "dtype": "fp32", "r": 4, "max_length": 64, "micro_batch": 2, "steps": 5, "warmup": 2}
FULL = {"model": "llama-2-7b", "dtype": "bf16", "r": 16, "max_length": 2048, "micro_batch": 1, "steps": 10, "warmup": 3}
MEMORY = re.compile(r"out of memory|OutOfMemory", re.IGNORECASE)
COUNTS = ("r", "max_length", "micro_batch", "accumulation", "steps", "rounds", "timeout")


class Parser(argparse.ArgumentParser):
    """Mistakes as one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; see --help")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Raises ConfigError."""
    gpus = torch.cuda.device_count()
    default = FULL if gpus else SMALL
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    counts = [n for n in (1, 2, 4, 8) if n <= gpus] or [2]
    parser.add_argument("--num_accelerators", type=int, nargs="+", default=counts, help="numbers of processes")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--model", default=default["model"], help=f"or one of {', '.join(method_models.SHAPES)}")
    parser.add_argument("--layers", type=int, help="keep the first N decoder layers")
    parser.add_argument("--dtype", default=default["dtype"], help="of compute; the reference is fp32 always")
    parser.add_argument("--r", type=int, default=default["r"])
    parser.add_argument("--slices", type=int, help="default: one per process")
    parser.add_argument("--max_length", type=int, default=default["max_length"], help="tokens of the longest rows")
    parser.add_argument("--micro_batch", type=int, default=default["micro_batch"], help="rows")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a process per step")
    parser.add_argument("--steps", type=int, default=default["steps"], help="measured, of each run")
    parser.add_argument("--warmup", type=int, default=default["warmup"], help="steps before them")
    parser.add_argument("--zero", nargs="*", default=[], metavar="KEY=VALUE", help="of DeepSpeed's zero_optimization")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each method, the order rotating")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--decompose", action="store_true", help="singular vectors in random weights, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=int, default=1800, help="seconds that a run may take")
    timing.add_result_options(parser)
    args = parser.parse_args(argv)
    args.zero = dict(map(zero_key, args.zero))
    check(args, gpus)
    return args


def zero_key(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as in JSON."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        raise ConfigError(f"--zero {text}: must be KEY=VALUE with a number, true or false; write it so") from None


def check(args: argparse.Namespace, gpus: int) -> None:
    """Raises ConfigError for values that cannot be; what only one method cannot do becomes that method's row."""
    for name in COUNTS:
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.warmup < 0:
        raise ConfigError(f"--warmup {args.warmup}: must be at least 0")
    if args.max_length < 2:
        raise ConfigError(f"--max_length {args.max_length}: a row needs a token to predict; give at least 2")
    for count in args.num_accelerators:
        if count < 1:
            raise ConfigError(f"--num_accelerators {count}: must be at least 1")
        if gpus and count > gpus:
            raise ConfigError(f"--num_accelerators {count}: this machine has {gpus} GPUs; give at most {gpus}")
    for name in args.methods:
        if name not in METHODS:
            raise ConfigError(f"--methods {name}: there is none of this name; give some of {', '.join(METHODS)}")
    if args.dtype not in DTYPES:
        raise ConfigError(f"--dtype {args.dtype}: must be one of {', '.join(DTYPES)}")
    method_models.config_of(args.model, args.layers)


def setting(args: argparse.Namespace) -> Setting:
    """What the runs are built with. In random weights there is nothing to decompose, and step times do not change."""
    random = method_models.is_shape(args.model) and not args.decompose
    names = {field.name for field in dataclasses.fields(Setting)} & vars(args).keys()
    found = Setting(**{name: getattr(args, name) for name in names})
    pissa = "pissa_niter_16" if random else found.pissa
    return dataclasses.replace(found, random_slices=random, pissa=pissa, checkpointing=args.gradient_checkpointing)


# --- runs -----------------------------------------------------------------------------------------------------------


def run(method: str, ranks: int, job: dict[str, Any], timeout: int) -> dict[str, Any] | str:
    """A run of a method; its record, or why there is none."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, record, log = folder / "job.json", folder / "record.json", folder / "log"
        file.write_text(json.dumps(job | {"method": method}))
        launcher = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if launcher is None:
            raise ConfigError("deepspeed: no such command beside this Python or on PATH; install the package")
        command = [launcher, "--num_accelerators", str(ranks), "--master_port", str(free_port())]
        command += [str(WORKER), "--job", str(file), "--record", str(record)]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            try:
                code = process.wait(timeout)
            except BaseException as error:
                end(process.pid)
                if isinstance(error, subprocess.TimeoutExpired):
                    return f"not done after {timeout} s"
                raise
        if code == 0 and record.exists():
            return json.loads(record.read_text())
        print(log.read_text(errors="replace"), file=sys.stderr)
        failed = record.with_name(record.name + ".failed")
        return failed.read_text() if failed.exists() else reason(log.read_text(errors="replace"), code)


def end(pid: int) -> None:
    """Kills a launcher that this script has started, and all that it has started."""
    launcher = psutil.Process(pid)
    for process in [*launcher.children(recursive=True), launcher]:
        process.kill()
    launcher.wait()


def reason(log: str, code: int) -> str:
    """Of a run that could not say it itself: killed by the system, most likely for memory."""
    killed = re.search(r"(?:return code = |exits? (?:with )?code )-9\b", log)
    return "killed by signal 9: out of memory, most likely" if killed or code == -9 else f"exit code {code}"


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def turns(methods: list[str], rounds: int) -> list[list[str]]:
    """The order of each round: every method comes first once, as far as there are rounds."""
    return [methods[n % len(methods) :] + methods[: n % len(methods)] for n in range(rounds)]


def run_all(args: argparse.Namespace) -> Iterator[tuple[dict, dict]]:
    """After every run: ((count, method) → its rounds, (count, method) → why it failed), of all runs so far.

    A method that has failed is not tried again; the rounds that it has count.
    """
    job = {"setting": dataclasses.asdict(setting(args))}
    job |= {name: getattr(args, name) for name in ("max_length", "steps", "warmup")}
    keys = [(count, method) for count in dict.fromkeys(args.num_accelerators) for method in args.methods]
    runs: dict[tuple[int, str], list[dict[str, Any]]] = {key: [] for key in keys}
    failures: dict[tuple[int, str], str] = {}
    for count in dict.fromkeys(args.num_accelerators):
        for number, order in enumerate(turns(list(dict.fromkeys(args.methods)), args.rounds)):
            for method in order:
                if (count, method) in failures:
                    continue
                found = run(method, count, job, args.timeout)
                if isinstance(found, str):
                    failures[count, method] = found
                    print(f"{method} on {count}: failed: {found}", flush=True)
                else:
                    runs[count, method].append(throughput_table.merge(found))
                    steps = runs[count, method][-1]["step_s"]
                    p50 = throughput_table.percentile(steps, 50)
                    print(f"round {number + 1}: {method} on {count}: {p50:.4g} s per step", flush=True)
                yield {key: rounds for key, rounds in runs.items() if rounds}, failures


# --- results --------------------------------------------------------------------------------------------------------


def note(args: argparse.Namespace) -> str:
    """How to read the table."""
    gpu = torch.cuda.is_available()
    slices = "one slice per process" if args.slices is None else f"{args.slices} slices"
    memory = (
        "allocated on the device" if gpu else "resident of the process while it trains, about half a GB of it libraries"
    )
    rest = f" Processes share this machine's {os.cpu_count()} cores, each has its part as threads: nothing scales here."
    shortest = max(2, args.max_length // 4)
    parts = [
        f"{method_models.name_of(args.model, args.layers)}, {args.dtype} (reference: fp32), {args.micro_batch} rows × "
        f"{args.accumulation} micro-batches per process, rows of {shortest} to {args.max_length} tokens, "
        f"r = {args.r}, {slices}; {args.rounds} rounds of {args.steps} steps after {args.warmup}, a run of its own "
        f"through the deepspeed launcher each.{zero_note(args.zero)}",
        "tokens/s counts real tokens, without padding. CPU s: of all processes in a step. / frozen and reference / it: "
        "medians over rounds. efficiency: tokens/s per device over those of the fewest devices, each with the same "
        "work. update s: exchange and apply, mean of the processes.",
        *control(args.methods),
        f"MB received: of a process in a step, the most of any, counted at torch.distributed: {formula()}.",
        "Phases: forward and backward with the collectives that they wait for (gathers; of `full` the reduction of its "
        "gradients, too), exchange = in collectives of the optimizer step, and waiting there for slower processes, "
        "apply = the rest of it.",
        f"peak MB: the largest process, {memory}. Not alike in it: DeepSpeed reduces the gradients of lora, pissa and "
        f"full in a buffer of as many elements as are trained, at most 50 million; hd_pissa's go through none.",
        f"{throughput_work.FLOP_RULE}; MFU is over the data sheet's dense bf16 rate.{'' if gpu else rest}",
    ]
    return " ".join(parts)


def control(methods: list[str]) -> list[str]:
    """What the table has to measure its own noise by."""
    if not {"lora", "pissa"} <= set(methods):
        return []
    return ["lora and pissa run the same graph with other numbers in it: what their times differ by is noise."]


def zero_note(given: dict[str, Any]) -> str:
    told = ", ".join(f"{key} {value}" for key, value in given.items())
    base = "zero3.json" if torch.cuda.is_available() else "zero3_cpu.json without its stage3_max_reuse_distance"
    return f" ZeRO-3 of all as in ds_configs/{base}" + (f", and {told}." if told else ".")


def formula() -> str:
    """What wire.py says, in one line."""
    return (
        "with G processes and N bytes of each an all-gather and a reduce-scatter count (G − 1) N, an all-reduce "
        "2 (G − 1) N / G, an all-to-all what does not stay, a broadcast N but for the root"
    )


def headline(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Processor time on a CPU, which other processes disturb least; the clock on GPUs."""
    column = "/ frozen" if torch.cuda.is_available() else "CPU / frozen"
    last = [row for row in rows if row["ranks"] == args.num_accelerators[-1] and row.get(column)]
    told = ", ".join(f"{row['method']} {row[column]:.2f}" for row in last)
    return f"{column} on {args.num_accelerators[-1]} processes: {told}"


def name_of(args: argparse.Namespace) -> str:
    """Of the result, without its ending."""
    model = method_models.name_of(args.model, args.layers).lower()
    return timing.labelled(f"throughput_{re.sub(r'[^a-z0-9.]+', '_', model)}_{args.dtype}", args.label)


def report(args: argparse.Namespace, runs: dict, failures: dict) -> None:
    """Writes the table, and then its pictures: a figure must not be lost with a picture of it."""
    rows = throughput_table.table(runs, failures, throughput_work.model_work(args.model, args.layers))
    args.folder.mkdir(parents=True, exist_ok=True)
    name = name_of(args)

    def write(pictures: list[str]) -> None:
        timing.write(
            name,
            rows,
            throughput_table.COLUMNS,
            note(args),
            folder=args.folder,
            identity=throughput_table.IDENTITY,
            configuration=timing.configuration_of(args),
            pictures=pictures,
            headline=headline(rows, args),
            show=False,
        )

    write([])
    try:
        pictures = throughput_table.draw(rows, args.folder, name)
    except Exception as error:  # no matplotlib, say
        print(f"no picture: {type(error).__name__}: {error}", file=sys.stderr)
    else:
        write(pictures)


def main(argv: list[str] | None = None) -> int:
    failures: dict = {}
    try:
        args = parse(argv)
        for runs, failures in run_all(args):  # after every run, so that whatever stops this leaves something
            report(args, runs, failures)
        print((args.folder / f"{name_of(args)}.md").read_text(), flush=True)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # that a method does not fit is a finding, and has its row
    return 1 if any(not MEMORY.search(why) for why in failures.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
