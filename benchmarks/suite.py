"""All benchmarks that need no GPU, each in a small form, and what each of them found: `make bench`.

    python benchmarks/suite.py [--folder outputs/bench] [NAME ...]

About ten minutes on two cores. Scripts that are about memory, counts or processor time run two at a time. Results lie
in --folder, as JSON and Markdown, and compare.py compares them with those of another run. They are small forms: the
committed ones in benchmarks/results/ are of full size. A script that fails is named, and the others still run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdpissa.benchmarks.common import timing
from hdpissa.engine.errors import ConfigError

HERE = Path(__file__).parent
LIMIT = 300  # seconds of a script


@dataclass(frozen=True)
class Step:
    """A script in its small form.

    Attributes:
        result: name of its result file.
        exclusive: whether it measures times by the clock, which another script at the same time would disturb.
    """

    result: str
    script: str
    arguments: tuple[str, ...] = ()
    exclusive: bool = True


STEPS = (
    Step("svd_weights", "startup/svd_methods.py", ("--model", "--layers", "2", "--ranks", "128")),
    Step("svd_methods", "startup/svd_methods.py", ("--largest", "1024", "--ranks", "128")),
    Step("checkpoint", "memory/checkpoint.py", ("--slices", "2", "--rounds", "1")),
    Step(
        "throughput_tiny_fp32",
        "step/throughput.py",
        ("--num_accelerators", "2", "--methods", "hd_pissa", "frozen", "reference"),
    ),
    Step("slice_cache_start", "startup/slice_cache_start.py", ("--ranks", "1"), exclusive=False),
    Step("load_memory", "memory/load_memory.py", ("--gigabytes", "0.2", "--ranks", "2"), exclusive=False),
    Step("export_memory", "memory/export_memory.py", ("--gigabytes", "0.1"), exclusive=False),
    Step("plan_counted", "step/plan_counted.py", ("--num_accelerators", "1", "2"), exclusive=False),
    Step("aot", "kernel_timing/aot_table.py", exclusive=False),
)


def run(step: Step, folder: Path) -> tuple[str, float]:
    """What the script found, or what went wrong, and the seconds that it took."""
    print(f"{step.script} {' '.join(step.arguments)}", flush=True)
    result, log, start = folder / f"{step.result}.json", folder / f"{step.result}.log", time.monotonic()
    result.unlink(missing_ok=True)  # of a script that fails now, nothing may seem measured
    environment = {**os.environ, "HDPISSA_RESULTS": str(folder.resolve())}
    if not step.exclusive:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // 2))
    command = ["timeout", "--kill-after", "5", str(LIMIT), sys.executable, str(HERE / step.script), *step.arguments]
    with log.open("w") as output:  # `timeout` ends its ranks, too
        code = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    seconds = time.monotonic() - start
    if code:
        return f"exit code {code}; see {log}", seconds
    content: dict[str, Any] = json.loads(result.read_text())
    return content.get("headline") or content["note"].split(". ")[0], seconds


def main() -> int:
    from rich.console import Console
    from rich.table import Table

    known = {step.result: step for step in STEPS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"), help="where the results go")
    args = parser.parse_args()
    for name in args.names:
        if name not in known:
            raise ConfigError(f"no benchmark {name}; give of {', '.join(known)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    timing.demo_model()  # here, so that no benchmark's time contains it
    steps = [known[name] for name in args.names] or STEPS
    found = {step: run(step, args.folder) for step in steps if step.exclusive}
    with ThreadPoolExecutor(2) as pool:
        others = [step for step in steps if not step.exclusive]
        found |= zip(others, pool.map(run, others, [args.folder] * len(others)), strict=True)
    table = Table("benchmark", "s", "found", title=f"Small forms; results in {args.folder}")
    for step, (outcome, seconds) in found.items():
        table.add_row(step.result, f"{seconds:.0f}", outcome)
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)
    return 1 if any(outcome.startswith("exit code") for outcome, _ in found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(timing.run(main))
