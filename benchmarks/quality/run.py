"""What fine-tuning learns and forgets: a campaign of many runs, each one record.

    python benchmarks/quality/run.py --rung fast --train gsm8k_train.jsonl --test gsm8k_test.jsonl --jobs 2
    python benchmarks/quality/run.py --rung fast --status
    python benchmarks/quality/run.py --rung fast --report

It takes whatever is missing, one process and one core per run, until nothing is, or --hours are over. A run that was
killed has left nothing and is run again; one that is there is never repeated. Data: rows with `question` and `answer`.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import math
import os
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from hdpissa.benchmarks.common import apart
from hdpissa.benchmarks.quality.campaign import Run, finalists, missing
from hdpissa.benchmarks.quality.rungs import RUNGS, Rung

RECORDS = Path(__file__).resolve().parent.parent / "results" / "quality"


def losses(folder: Path, rung: Rung) -> dict[str, float]:
    """Record → test loss; infinite where the run failed."""
    found = {}
    for path in folder.glob(f"{rung.name}-*.json"):
        last = json.loads(path.read_text())["train_info"]["metrics"][-1]["test loss"]
        found[path.stem] = math.inf if last is None else last
    return found


def work(run: Run, rung: Rung, folder: str, train: str, test: str) -> None:
    """One run; what is printed is kept only where it failed."""
    log = Path(folder) / f".{run.name}.log"
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from hdpissa.benchmarks.quality import train_arm

    target = Path(folder) / f"{run.name}.json"
    with open(target.with_name(f".{run.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a run that has outlived its driver ends first
        if not target.exists():
            with tempfile.TemporaryDirectory() as scratch:
                train_arm.write(train_arm.train(run, rung, train, test, scratch), target)
        os.unlink(lock.name)
    log.unlink(missing_ok=True)
    os._exit(0)  # nothing of a library's own ending can spoil it now


def carry_out(rung: Rung, folder: Path, train: str, test: str, *, jobs: int, hours: float) -> int:
    """Runs what is missing; the number of runs that ended without a record."""
    context: Any = apart.way_to_start(["hdpissa.benchmarks.quality.train_arm"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{rung.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # one driver
        end = time.monotonic() + 3600 * hours
        under_way, lost = dict[Any, Run](), set[str]()
        while True:
            busy = {run.name for run in under_way.values()} | lost
            for run in missing(rung, losses(folder, rung)):
                if len(under_way) < jobs and run.name not in busy and time.monotonic() < end:
                    process = context.Process(target=work, args=(run, rung, str(folder), train, test))
                    process.start()
                    under_way[process] = run
                    busy.add(run.name)
            if not under_way:
                return len(lost)
            sentinels: dict[Any, Any] = {process.sentinel: process for process in under_way}
            for sentinel in wait(list(sentinels)):
                process = sentinels[sentinel]
                process.join()
                run = under_way.pop(process)
                known = losses(folder, rung).get(run.name)
                told = f"no record; see .{run.name}.log" if known is None else f"test loss {known:.4f}"
                print(f"{run.name}: {told}", flush=True)
                if known is None:
                    lost.add(run.name)


def status(rung: Rung, folder: Path) -> None:
    found = losses(folder, rung)
    for point in rung.points:
        done = finalists(rung, point, found)
        rate = f"rate {done[0].rate:g}, {len(done)} of {rung.seeds} seeds" if done else "rates not chosen yet"
        print(f"{point.arm.name:12} batch {point.batch:4}  {rate}")
    rest = missing(rung, found)
    print(f"{len(found)} records; next: {rest[0].name if rest else 'nothing, all is there'}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rung", choices=list(RUNGS), default="fast")
    parser.add_argument("--train", help="jsonl with question and answer")
    parser.add_argument("--test", help="jsonl with question and answer")
    parser.add_argument("--model", help="folder or hub name in the place of the rung's")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, each on one core")
    parser.add_argument("--hours", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--status", action="store_true", help="what is there, and what is next")
    parser.add_argument("--report", action="store_true", help="tables and pictures of what is there")
    args = parser.parse_args(argv)
    rung = RUNGS[args.rung]
    if args.model:
        rung = dataclasses.replace(rung, model=args.model)
    if args.status:
        status(rung, args.records)
        return 0
    if args.report:
        from hdpissa.benchmarks.quality import report

        report.write(rung, args.records)
        return 0
    if not args.train or not args.test:
        parser.error("--train and --test are needed: jsonl files with the fields question and answer")
    return 1 if carry_out(rung, args.records, args.train, args.test, jobs=args.jobs, hours=args.hours) else 0


if __name__ == "__main__":
    sys.exit(main())
