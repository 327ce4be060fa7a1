"""All benchmarks that need no GPU, each in a small form, and what each of them found: `make bench`.

    python benchmarks/suite.py [--folder outputs/bench] [NAME ...]

About ten minutes on two cores. Scripts that are about memory, counts, ranks or processor time run two at a time, so
that the seconds by the clock which they tell, too, are longer than alone. The results lie in --folder, as JSON,
Markdown and pictures, and can be compared with those of another run (compare.py). They are small forms: the committed
ones in benchmarks/results/ are of full size, and the command of each is in benchmarks/README.md. A script that fails
is named, and the others still run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdpissa.launch.demo_model import DemoModelError, ensure_demo_model

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Step:
    """A script in its small form.

    Attributes:
        result: name of the result file. limit: seconds. more: names of the other results that it writes.
        alone: whether it is about times by the clock, which another script beside it would disturb.
    """

    result: str
    script: str
    arguments: tuple[str, ...] = ()
    limit: int = 300
    more: tuple[str, ...] = ()
    alone: bool = True


STEPS = (
    Step("cpu_rates", "cpu_rates.py", ("--seconds", "0.3")),
    Step("cpu_layers_fp32_2_layers", "cpu_layers.py", ("--dtype", "fp32", "--layers", "2", "--rounds", "3")),
    Step("init", "init.py", ("--layers", "2")),
    Step("svd_methods", "svd_methods.py", ("--largest", "1024", "--ranks", "128")),
    Step("checkpoint", "checkpoint.py", ("--slices", "2", "--rounds", "1")),
    Step(
        "throughput_tiny_fp32",
        "throughput.py",
        ("--num_accelerators", "2", "--methods", "hd_pissa", "frozen", "reference"),
    ),
    # the longest first, so that none of them is left to run without company
    Step(
        "update_rank",
        "update_rank.py",
        ("--layers", "15", "--methods", "lora", "hd_pissa", "--slices", "8", "--steps", "1", "--max_length", "64"),
        alone=False,
    ),
    Step("slice_cache_start", "slice_cache_start.py", ("--ranks", "1"), alone=False),
    Step("load_memory", "load_memory.py", ("--gigabytes", "0.2", "--ranks", "2"), alone=False),
    Step("export_memory", "export_memory.py", ("--gigabytes", "0.1"), alone=False),
    Step("plan_counted", "projection.py", ("--num_accelerators", "1", "2"), more=("projection",), alone=False),
    Step("aot", "aot_table.py", alone=False),
)
COMPANY = 2  # scripts at a time of those that need not be alone


class Runner:
    """Runs scripts, each with its output in a file; whatever stops it stops them."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self._running: set[subprocess.Popen] = set()

    def run(self, step: Step) -> tuple[str, float]:
        """("", seconds), or what went wrong."""
        print(f"{step.script} {' '.join(step.arguments)}", flush=True)
        clear(step, self.folder)
        # two scripts side by side have a core each
        threads = {} if step.alone else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // COMPANY))}
        log, start = self.folder / f"{step.script[:-3]}.log", time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, str(HERE / step.script), *step.arguments],
                env=self.environment | threads,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that ranks end with it
            )
        self._running.add(process)
        try:
            code = process.wait(step.limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {step.limit} s; see {log}", time.monotonic() - start
        finally:  # also when a person stops the suite
            self._end(process)
            self._running.discard(process)
        return "" if code == 0 else f"exit code {code}; see {log}", time.monotonic() - start

    @staticmethod
    def _end(process: subprocess.Popen) -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def run_all(self, steps: Sequence[Step]) -> dict[Step, tuple[str, float]]:
        """Those that must be alone one after another, then the rest side by side."""
        found = {step: self.run(step) for step in steps if step.alone}
        others = [step for step in steps if not step.alone]
        with ThreadPoolExecutor(COMPANY) as pool:
            futures = [pool.submit(self.run, step) for step in others]
            try:
                return found | {step: future.result() for step, future in zip(others, futures, strict=True)}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self._running):
                    self._end(process)
                raise


def clear(step: Step, folder: Path) -> None:
    """Removes what an earlier run of the step left: of a script that fails now, nothing may seem measured."""
    for name in (step.result, *step.more):
        for file in (*folder.glob(f"{name}.*"), *folder.glob(f"{name}_*.png")):
            file.unlink()


def found(step: Step, folder: Path) -> str:
    """The headline of a result, or the first sentence of its note."""
    content: dict[str, Any] = json.loads((folder / f"{step.result}.json").read_text())
    return content.get("headline") or content["note"].split(". ")[0]


def main(argv: list[str] | None = None) -> int:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(s.script[:-3] for s in STEPS)}")
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"), help="where the results go")
    args = parser.parse_args(argv)
    known = {step.script[:-3]: step for step in STEPS}
    unknown = [name for name in args.names if name not in known]
    if unknown:
        print(f"suite.py: no benchmark {unknown[0]} here; there are {', '.join(known)}", file=sys.stderr)
        return 2
    args.folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "HDPISSA_RESULTS": str(args.folder.resolve())}
    try:
        ensure_demo_model()  # here, so that no benchmark's time has it
    except DemoModelError as error:
        print(f"suite.py: the demo model cannot be had: {error}", file=sys.stderr)
        return 2
    table = Table("benchmark", "s", "found", title=f"Small forms; results in {args.folder}")
    begin = time.monotonic()
    done = Runner(args.folder, environment).run_all([known[name] for name in args.names] or STEPS)
    for step, (problem, seconds) in done.items():
        table.add_row(step.script[:-3], f"{seconds:.0f}", problem or found(step, args.folder))
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)
    print(f"{time.monotonic() - begin:.0f} s in all")
    return 1 if any(problem for problem, _ in done.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
