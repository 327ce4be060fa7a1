"""How fast is a whole training step, compared with PEFT, full fine-tuning, a frozen base and the published algorithm,
and how does it scale?

    python benchmarks/step/throughput.py [--num_accelerators 1 2 4 8] [--model FOLDER|HUB NAME|SHAPE]
        [--methods hd_pissa lora pissa full frozen reference] [--dtype fp32|bf16] [--rounds N] …

Every method at every number of processes is a run of its own through the real `deepspeed` launcher, on the same rows of
random tokens (throughput_worker.py). What a rank gets stays the same when there are more of them. A round runs all
methods one after another, each round in another order; ratios are taken within a round, and their median counts. A
method that fails has a row with the reason. After every run the result is written with what there is so far.

Without a GPU the defaults are a tiny model on 2 processes; most of the time is the start of the processes. With GPUs
they are a Llama-2-7B of random weights in bf16 on 1, 2, 4, … GPUs. In phases of `make gpu` every run is a row, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import torch

from hdpissa.benchmarks.common import ranks, timing
from hdpissa.benchmarks.gpu import gpu_rows
from hdpissa.benchmarks.step import method_models, throughput_table, throughput_worker
from hdpissa.benchmarks.step.methods import DTYPES, METHODS, Setting
from hdpissa.engine.errors import ConfigError

SMALL = {"model": "tiny", "dtype": "fp32", "r": 4, "max_length": 64, "micro_batch": 2, "steps": 5, "warmup": 2}
FULL = {"model": "llama-2-7b", "dtype": "bf16", "r": 16, "max_length": 2048, "micro_batch": 1, "steps": 10, "warmup": 3}
MEMORY = re.compile(r"out of memory|OutOfMemory", re.IGNORECASE)
LEAST = {
    "r": 1,
    "micro_batch": 1,
    "accumulation": 1,
    "steps": 1,
    "rounds": 1,
    "timeout": 1,
    "warmup": 0,
    "max_length": 2,
}
Key = tuple[int, str]  # number of processes, method


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Raises ConfigError."""
    gpus = torch.cuda.device_count()
    default = FULL if gpus else SMALL
    parser = timing.Parser(__doc__)
    counts = [n for n in (1, 2, 4, 8) if n <= gpus] or [2]
    parser.add_argument("--num_accelerators", type=int, nargs="+", default=counts, help="numbers of processes")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--model", default=default["model"], help=f"or one of {', '.join(method_models.SHAPES)}")
    parser.add_argument("--layers", type=int, help="keep the first N decoder layers")
    parser.add_argument("--dtype", default=default["dtype"], choices=DTYPES, help="of compute; reference: fp32 always")
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
    args = parser.parse_args(argv)
    args.zero = dict(map(zero_key, args.zero))
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be at least {least}")
    for count in args.num_accelerators:
        if not 1 <= count <= (gpus or count):
            raise ConfigError(f"--num_accelerators {count}: must be at least 1, and at most this machine's {gpus} GPUs")
    method_models.config_of(args.model, args.layers)  # refuses what is no model
    return args


def zero_key(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as in JSON."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        raise ConfigError(f"--zero {text}: must be KEY=VALUE with a number, true or false; write it so") from None


def setting(args: argparse.Namespace) -> Setting:
    """What the runs are built with. In random weights there is nothing to decompose, and step times do not change."""
    random = method_models.is_shape(args.model) and not args.decompose
    names = {field.name for field in dataclasses.fields(Setting)} & vars(args).keys()
    found = Setting(**{name: getattr(args, name) for name in names})
    pissa = "pissa_niter_16" if random else found.pissa
    return dataclasses.replace(found, random_slices=random, pissa=pissa, checkpointing=args.gradient_checkpointing)


def turns(methods: list[str], rounds: int) -> list[list[str]]:
    """The order of each round: every method comes first once, as far as there are rounds."""
    return [methods[n % len(methods) :] + methods[: n % len(methods)] for n in range(rounds)]


def run_all(args: argparse.Namespace) -> Iterator[tuple[Key, dict[Key, list[dict[str, Any]]], dict[Key, str]]]:
    """After every run: its key, and of all runs so far key → rounds, and key → why it failed.

    A method that has failed is not tried again; the rounds that it has count.
    """
    job: dict[str, Any] = {"setting": dataclasses.asdict(setting(args))}
    job |= {name: getattr(args, name) for name in ("max_length", "steps", "warmup")}
    methods, counts = (list(dict.fromkeys(values)) for values in (args.methods, args.num_accelerators))
    runs: dict[Key, list[dict[str, Any]]] = {(count, method): [] for count in counts for method in methods}
    failures: dict[Key, str] = {}
    for count in counts:
        for method in (method for order in turns(methods, args.rounds) for method in order):
            key = count, method
            if key in failures:
                continue
            how: dict[str, Any] = {"timeout": args.timeout, "threads": 0, "method": method}
            try:
                runs[key].append(throughput_table.merge(ranks.launch(throughput_worker.measure, count, **how, **job)))
            except ranks.FailedRunError as error:
                failures[key] = str(error)
            yield key, {key: rounds for key, rounds in runs.items() if rounds}, failures


def note(args: argparse.Namespace) -> str:
    """How to read the table."""
    gpu = torch.cuda.is_available()
    base = "zero3.json" if gpu else "zero3_cpu.json without its stage3_max_reuse_distance"
    memory = "allocated on the device" if gpu else "resident of the process while it trains, libraries included"
    shortest = max(2, args.max_length // 4)
    return (
        f"A run of its own for each method and round. ZeRO-3 of all as in ds_configs/{base}. Rows of {shortest} to "
        f"{args.max_length} tokens; tokens/s counts real ones, without padding. CPU s: of all processes in a step. "
        f"/ frozen and reference / it: medians over rounds. efficiency: tokens/s per device over those of the "
        f"fewest devices. update s: exchange and apply, mean of the processes. lora and pissa run the same graph "
        f"with other numbers in it: what their times differ by is noise. MB received: of a process in a step, the "
        f"most of any, counted at torch.distributed (wire.py). Forward and backward hold the collectives that they "
        f"wait for, exchange those of the optimizer step and waiting there for slower processes. peak MB: the "
        f"largest process, {memory}; DeepSpeed reduces the gradients of lora, pissa and full in a buffer of as "
        f"many elements as are trained, at most 50 million. {throughput_table.FLOP_RULE}; MFU is over the data "
        f"sheet's dense bf16 rate."
    )


def report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Writes the table. Headline: processor time on a CPU, which other processes disturb least; the clock on GPUs."""
    column, most = "/ frozen" if torch.cuda.is_available() else "CPU / frozen", args.num_accelerators[-1]
    ratios = [f"{row['method']} {row[column]:.2f}" for row in rows if row["ranks"] == most and row.get(column)]
    model = re.sub(r"[^a-z0-9.]+", "_", method_models.name_of(args.model, args.layers).lower())
    timing.write(
        f"throughput_{model}_{args.dtype}",
        args,
        rows,
        throughput_table.COLUMNS,
        note(args),
        identity=throughput_table.IDENTITY,
        headline=f"{column} on {most} processes: {', '.join(ratios)}",
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    failures: dict[Key, str] = {}
    for (count, method), runs, failures in run_all(args):
        rows = throughput_table.table(runs, failures, throughput_table.model_work(args.model, args.layers))
        report(args, rows)
        last = next(row for row in rows if (row["ranks"], row["method"]) == (count, method))
        gpu_rows.record({"table": method_models.name_of(args.model, args.layers), **last})
    # that a method does not fit is a finding, and has its row
    return 1 if any(not MEMORY.search(why) for why in failures.values()) else 0


if __name__ == "__main__":
    raise SystemExit(timing.run(main))
