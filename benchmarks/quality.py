"""Which method learns a task best? LoRA, PiSSA, HD-PiSSA and full fine-tuning, each at its own best learning rate.

    python benchmarks/quality.py [--dataset_name gsm8k.jsonl --prompt_field question --response_field answer]
        [--preset small|full] [--steps N | --steps 0 --num_train_epochs 1] [--time_limit MINUTES] [--report]

Six arms: LoRA and PiSSA at r and at r·S, HD-PiSSA with S slices of r, full fine-tuning; and the base model, untrained.
All take the same micro-batches in the same order, 8 of them per step by default, and the same number of steps. Each
arm has a sweep of three learning rates of its own with the first seed; the one with the least validation loss is run
with the other seeds. A seed is the order of the data and an adapter's random initialisation. Answers to held-out
problems are generated greedily by a plain transformers model with the merged weights.

Every run is a process (quality_run.py) and leaves a JSON in --output_dir, so an interrupted comparison goes on where it
was: a run that is there is not repeated, a failed one is tried again. Runs take turns (every arm's usual rate first),
so what an interruption leaves is balanced. --time_limit stops between two runs; --report only shows what is there.
Only runs at planned rates and seeds stand in the table, and all arms in one folder have equally many planned rates.

Without a GPU the defaults are twenty fp32 steps on short rows; with one they are an epoch in bf16 (--preset).
"""

from __future__ import annotations

import datetime
import json
import math
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hdpissa.benchmarks import apart, quality_record, quality_report, quality_run, task, timing
from hdpissa.benchmarks.quality_record import Job, Plan, Training
from hdpissa.engine.errors import ConfigError
from hdpissa.launch.command_line import option

# Learning rates that are usual for runs of some hundred steps and more: PEFT's LoRA examples and QLoRA (arXiv
# 2305.14314) 2e-4; PiSSA (2404.02948) and HD-PiSSA (2505.18777) 2e-5, which is usual for full fine-tuning, too.
USUAL = {"lora": 2e-4, "pissa": 2e-5, "hd_pissa": 2e-5, "full": 2e-5}
# An epoch of GSM8K (7,473 rows, 1,319 to test with), or of as many generated problems.
FULL: dict[str, Any] = {"dtype": "bf16", "steps": 0, "num_train_epochs": 1.0, "rate_scale": 1.0, "max_length": 512}
FULL |= {"micro_batch": 4, "accumulation": 8, "train_rows": 7473, "eval_rows": 256, "eval_batch": 64, "eval_steps": 50}
FULL |= {"test_rows": 1319, "max_new_tokens": 256}
PRESETS: dict[str, dict[str, Any]] = {"small": {}, "full": FULL}


@dataclass
class Arguments(Training):
    """Compares what methods learn of a task."""

    preset: str = option("", "defaults: small, twenty steps, or full, an epoch in bf16; full where there is a GPU")
    arms: list[str] = field(default_factory=list, metadata={"help": "some of them; default all six"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "the first one also for the sweep"})
    rate_scale: float = option(10.0, "times the usual learning rates; 1 for long runs, more for a few steps")
    rate_spread: float = option(3.0, "ratio of neighbouring learning rates of a sweep")
    rates: list[str] = field(
        default_factory=list, metadata={"help": "an arm's own sweep instead, the usual rate first: lora_r16=1e-4,3e-4"}
    )
    output_dir: str = option("outputs/quality", "a JSON of each run, and its answers")
    name: str = option("quality", "name of the result files")
    folder: str = option(str(timing.RESULTS), "where the results go")
    time_limit: float | None = option(None, "minutes after which no run is started that would not end within them")
    report: bool = option(
        False, "only show the runs that are there, by the rates and seeds that they were planned with"
    )
    given: frozenset[str] = field(default=frozenset(), init=False)  # options that stand on the command line


@dataclass(frozen=True)
class Arm:
    """A method with its rank, and the learning rates of its sweep, the usual one first."""

    name: str
    method: str
    r: int
    slices: int
    rates: tuple[float, ...]


def make_arms(args: Arguments) -> dict[str, Arm]:
    """The arms of a comparison, in order.

    Raises:
        ConfigError: an arm that is not there, or sweeps of unequal size.
    """
    wide = args.r * args.slices
    kinds = [("lora", r, 0) for r in (args.r, wide)] + [("pissa", r, 0) for r in (args.r, wide)]
    kinds += [("hd_pissa", args.r, args.slices), ("full", 0, 0)]
    own = dict(_own_rates(text) for text in args.rates)
    arms = {}
    for method, r, slices in kinds:
        name = {"hd_pissa": f"hd_pissa_s{slices}_r{r}", "full": "full"}.get(method, f"{method}_r{r}")
        middle = USUAL[method] * args.rate_scale
        usual = (middle, middle / args.rate_spread, middle * args.rate_spread)
        arms[name] = Arm(name, method, r, slices, own.pop(name, tuple(float(f"{rate:.3g}") for rate in usual)))
    for given, names in (("--rates", own), ("--arms", args.arms)):
        for name in names:
            if name not in arms and name not in own:
                raise ConfigError(f"{given} {name}: there is no such arm; give one of {', '.join(arms)}")
    if own:
        raise ConfigError(f"--rates {next(iter(own))}: there is no such arm; give one of {', '.join(arms)}")
    chosen = {name: arm for name, arm in arms.items() if not args.arms or name in args.arms}
    refuse_unequal({name: arm.rates for name, arm in chosen.items()}, "--rates")
    return chosen


def refuse_unequal(sweeps: Mapping[str, Sequence[float]], where: str) -> None:
    """Who may try more learning rates has the better chance."""
    least, most = (pick(sweeps, key=lambda arm: len(sweeps[arm]), default="") for pick in (min, max))
    if sweeps and len(sweeps[least]) < len(sweeps[most]):
        raise ConfigError(
            f"{where}: sweeps of {len(sweeps[least])} rates ({least}) and of {len(sweeps[most])} ({most}); give every "
            f"arm equally many, to be fair"
        )


def _own_rates(text: str) -> tuple[str, tuple[float, ...]]:
    name, _, rates = text.partition("=")
    try:
        found = tuple(float(rate) for rate in rates.split(","))
    except ValueError:
        found = ()
    if not found or min(found) <= 0 or len(set(found)) < len(found):
        raise ConfigError(f"--rates {text}: must be ARM=RATE,RATE,… with different positive rates; write it so")
    return name, found


# --- what belongs together --------------------------------------------------------------------------------------------


def plan_of(args: Arguments, arms: Mapping[str, Arm]) -> Plan:
    return Plan({name: arm.rates for name, arm in arms.items()}, tuple(args.seeds))


def recorded_plan(args: Arguments, records: Iterable[Mapping[str, Any]]) -> Plan:
    """What the runs of a folder were planned as: the latest run's word counts, and before it --seeds and --rates."""
    by_age = sorted(records, key=lambda record: record["run_info"].get("created_at", ""))
    rates: dict[str, tuple[float, ...]] = {}
    seeds = tuple(args.seeds)
    for plan in (record["hdpissa"].get("plan") for record in by_age):
        if plan:
            rates |= {arm: tuple(found) for arm, found in plan["rates"].items()}
            seeds = seeds if "seeds" in args.given else tuple(plan["seeds"])
    silent: dict[str, set[float]] = {}
    for own in (record["hdpissa"] for record in by_age):
        if own["method"] and own["arm"] not in rates and own["seed"] == seeds[0]:
            silent.setdefault(own["arm"], set()).add(own["lr"])
    own_rates = dict(_own_rates(text) for text in args.rates)
    rates |= {arm: tuple(sorted(found)) for arm, found in silent.items()}
    for given, names in (("--rates", own_rates), ("--arms", args.arms)):
        for name in names:
            if name not in rates:
                raise ConfigError(f"{given} {name}: --output_dir {args.output_dir} has none of it; leave it out")
    rates = {arm: own_rates.get(arm, found) for arm, found in rates.items() if not args.arms or arm in args.arms}
    return Plan(rates, seeds, guessed=frozenset(silent) - own_rates.keys())


def refuse_mixture(args: Arguments, plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ConfigError where arms that have runs in the folder were planned with unequal numbers of rates."""
    there = recorded_plan(replace(args, rates=[], arms=[]), records.values())
    run = {record["hdpissa"]["arm"] for record in records.values()}
    known = {arm: rates for arm, rates in there.rates.items() if arm in run and arm not in there.guessed}
    ours = {arm: rates for arm, rates in plan.rates.items() if arm not in plan.guessed}
    refuse_unequal(known | ours, f"--rates, and the runs in --output_dir {args.output_dir}")


def select(records: Mapping[str, dict], plan: Plan) -> tuple[dict[str, dict], Plan]:
    """The runs that belong to a plan, and the plan with the numbers of the others."""
    names, aside = plan.experiments(), dict[str, int]()
    for name, record in records.items():
        if name not in names and record["hdpissa"]["arm"] in plan.rates:
            aside[record["hdpissa"]["arm"]] = aside.get(record["hdpissa"]["arm"], 0) + 1
    return {name: record for name, record in records.items() if name in names}, replace(plan, set_aside=aside)


# --- which run comes next ---------------------------------------------------------------------------------------------


def next_job(args: Arguments, arms: Mapping[str, Arm], done: Mapping[str, dict], tried: set[str]) -> Job | None:
    """The first planned run that is neither done nor tried; None when there is none."""
    return next((j for j in plan(args, arms, done) if j.experiment not in done and j.experiment not in tried), None)


def plan(args: Arguments, arms: Mapping[str, Arm], done: Mapping[str, dict]) -> Iterator[Job]:
    """All runs in order; see `in_order`."""
    whole = plan_of(args, arms)
    for name, rate, seed in in_order(whole, done):
        yield make_job(args, arms.get(name), rate, seed, whole)


def in_order(plan: Plan, done: Mapping[str, dict]) -> Iterator[tuple[str, float, int]]:
    """(arm, rate, seed): the base; every arm's first rate, its second, …; then the best rates with the other seeds.

    An arm's best rate is known once its sweep is done; before that its other seeds do not appear.
    """
    yield "base", 0.0, plan.seeds[0]
    for number in range(max(map(len, plan.rates.values()), default=0)):
        for arm, rates in plan.rates.items():
            if number < len(rates):
                yield arm, rates[number], plan.seeds[0]
    for seed in plan.seeds[1:]:
        for arm in plan.rates:
            best = best_rate(plan, arm, done)
            if best is not None:
                yield arm, best, seed


def best_rate(plan: Plan, arm: str, done: Mapping[str, dict]) -> float | None:
    """The rate with the least validation loss of the sweep; None before the sweep is complete, or if all diverged."""
    losses = {}
    for rate in plan.rates[arm]:
        record = done.get(quality_record.experiment(arm, rate, plan.seeds[0]))
        if record is None:
            return None
        losses[rate] = quality_report.last(record, "valid loss")
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda rate: finite[rate]) if finite else None


def missing_of(plan: Plan, done: Mapping[str, dict]) -> list[str]:
    """Planned runs that are not there. An arm of which every rate diverged has no further ones."""
    missing = [name for name in (quality_record.experiment(*run) for run in in_order(plan, done)) if name not in done]
    first = plan.seeds[0]
    for arm, rates in plan.rates.items():
        swept = all(quality_record.experiment(arm, rate, first) in done for rate in rates)
        if not swept and plan.seeds[1:]:
            missing.append(f"{arm} at its best rate, seeds {list(plan.seeds[1:])}")
    return missing


def make_job(args: Arguments, arm: Arm | None, rate: float, seed: int, whole: Plan) -> Job:
    name = arm.name if arm else "base"
    experiment = quality_record.experiment(name, rate, seed)
    folder, file = Path(args.output_dir), experiment.replace("/", "--")
    common = {f.name: getattr(args, f.name) for f in fields(Training)}
    return Job(
        arm=name,
        method=arm.method if arm else None,
        r=arm.r if arm else 0,
        slices=arm.slices if arm else 0,
        lr=rate,
        seed=seed,
        arguments=common,
        configuration=configuration(args),
        record=str(folder / f"{file}.json"),
        answers=str(folder / "answers" / f"{file}.jsonl"),
        plan=whole.as_record(),
    )


def configuration(args: Arguments) -> dict[str, Any]:
    """What two runs must have in common to stand in one table; of paths the last part."""
    common = {f.name: getattr(args, f.name) for f in fields(Training)}
    for name in ("model_name_or_path", "dataset_name", "test_dataset_name"):
        common[name] = common[name] and Path(common[name]).name
    return common


# --- running ----------------------------------------------------------------------------------------------------------


def read_records(args: Arguments, *, digest: str | None = None, any_configuration: bool = False) -> dict[str, dict]:
    """experiment → record of a run that came to its end, or diverged.

    Args:
        digest: of the task's rows (`task.Task.digest`); None is any, the same for all records.

    Raises:
        ConfigError: runs of another configuration, or on other rows, are in the folder.
    """
    found, expected = {}, None if any_configuration else configuration(args)
    for path in sorted(Path(args.output_dir).glob("*.json")):
        try:
            record = json.loads(path.read_text())
            own, status = record["hdpissa"]["configuration"], record["train_info"]["status"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ConfigError(f"--output_dir {args.output_dir}: {path.name} is no record of a run; remove it") from None
        expected = expected or own
        if own != expected:
            keys = [key for key in expected if own.get(key) != expected[key]]
            raise ConfigError(
                f"--output_dir {args.output_dir} holds runs of another configuration ({path.name}: {', '.join(keys)}); "
                f"give another folder"
            )
        if status == "failed":
            continue
        rows = record["meta_info"]["dataset_info"]["task"]["sha"]
        if rows != (digest := digest or rows):
            raise ConfigError(
                f"--output_dir {args.output_dir} holds runs on other rows ({path.name}); give another folder, or the "
                f"same data"
            )
        found[record["run_info"]["experiment_name"]] = record
    return found


def sweep(args: Arguments, arms: Mapping[str, Arm], digest: str) -> str:
    """Runs what is missing; returns why it ended."""
    begin, tried = time.monotonic(), set[str]()
    done = read_records(args, digest=digest)
    longest = max((record["run_info"]["total_time"] for record in done.values()), default=0.0)
    while job := next_job(args, arms, done, tried):
        spent = time.monotonic() - begin
        if args.time_limit is not None and spent + longest > 60 * args.time_limit:
            return f"stopped after {spent / 60:.1f} minutes; the same command goes on"
        tried.add(job.experiment)
        start = time.monotonic()
        problem = run_job(job, digest)
        longest = max(longest, time.monotonic() - start)
        done = read_records(args, digest=digest)
        print(f"{job.experiment}: {problem or 'done'} ({time.monotonic() - start:.0f} s)", flush=True)
    failed = tried - done.keys()
    return f"{len(failed)} runs failed; the same command tries them again" if failed else "complete"


def run_job(job: Job, digest: str) -> str:
    """One run in a process of its own; returns what went wrong, in one line, or nothing.

    Args:
        digest: of the task's rows.
    """
    started, begin = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), time.monotonic()
    try:
        apart.call(quality_run.run_and_write, job)
        return ""
    except Exception as error:  # whatever it is, the others still run
        lines = str(error).splitlines() or [""]
        problem = f"{type(error).__name__}: {lines[0]}"
        trace = "".join(traceback.format_exception(error))
    record = {
        "run_info": quality_record.run_info(job, started, time.monotonic() - begin, error=trace),
        "train_info": {"status": "failed", "metrics": []},
        "meta_info": quality_record.meta_info(digest),
        "hdpissa": quality_record.identity(job),
    }
    quality_record.write_whole(Path(job.record), json.dumps(record, indent=1) + "\n")
    return f"failed: {problem}"


def check(args: Arguments) -> None:
    """Refuses what would fail in every run."""
    if not args.seeds or len(set(args.seeds)) < len(args.seeds):
        raise ConfigError(f"--seeds {args.seeds}: needs different seeds, at least one; give some")
    for name in ("eval_steps", "eval_batch", "test_rows", "r", "slices", "max_new_tokens", "rate_scale"):
        if getattr(args, name) <= 0:
            raise ConfigError(f"--{name} is {getattr(args, name)}: must be positive; raise it")
    if args.rate_spread <= 1:
        raise ConfigError(f"--rate_spread is {args.rate_spread}: must be above 1; raise it")
    if args.steps < 0 or (args.steps == 0 and args.num_train_epochs <= 0):
        raise ConfigError(f"--steps {args.steps}, --num_train_epochs {args.num_train_epochs}: no step; raise one")
    if args.dtype not in ("fp32", "bf16"):
        raise ConfigError(f"--dtype is {args.dtype!r}: must be fp32 or bf16; give one of them")
    task.refuse_slices([args.slices], args.accumulation)


def main() -> int:
    args = task.parse(Arguments, presets=PRESETS)
    check(args)
    found = read_records(args, any_configuration=args.report)
    if args.report:
        whole, ending = recorded_plan(args, found.values()), "report of what is there"
        refuse_mixture(args, whole, found)
    else:
        arms = make_arms(args)
        whole = plan_of(args, arms)
        refuse_mixture(args, whole, found)
        work = task.make_task(args, test_rows=args.test_rows, test_dataset_name=args.test_dataset_name)
        work.micro_batches(args, slices=args.slices, seed=args.seeds[0])  # refuses too few rows before any run
        ending = sweep(args, arms, work.digest)
        found = read_records(args)
    records, whole = select(found, whole)
    if not records:
        raise ConfigError(f"--output_dir {args.output_dir} holds no run that ended well; run without --report first")
    missing = missing_of(whole, records)
    quality_report.report(records, whole, missing, name=args.name, folder=Path(args.folder))
    print(f"{ending}; {len(records)} runs there, {len(missing)} missing" + "".join(f"\n  {line}" for line in missing))
    return 0


if __name__ == "__main__":
    sys.exit(task.run(main))
