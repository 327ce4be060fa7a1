"""What all benchmarks share: clocks, ceilings of a device, the command line's common options, and the result writer.

`write` leaves <name>.json and <name>.md in `benchmarks/results/`, or in the folder that HDPISSA_RESULTS names. A result
of the same name is replaced; --label TEXT writes another one.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from hdpissa.benchmarks.common.ranks import FailedRunError
from hdpissa.benchmarks.gpu import gpu_rows
from hdpissa.engine.errors import ConfigError, one_line
from hdpissa.engine.files import atomic

Key = TypeVar("Key")
BLOCKS = 20
# Of the scripts that measure once in one process: how much another run of the same code would differ is not known.
ONE_RUN: dict[str, Any] = {"rounds": 1}
RESULTS = Path(os.environ.get("HDPISSA_RESULTS") or Path(__file__).resolve().parents[1] / "results")


def need_gpu() -> torch.device:
    """The GPU that torch sees, the CPU in a dry run; else the script ends here, in one line and with exit code 2."""
    if gpu_rows.is_dry():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        print(f"{Path(sys.argv[0]).name}: no GPU here (torch.cuda.is_available() is False)", file=sys.stderr)
        raise SystemExit(2)
    return torch.device("cuda", torch.cuda.current_device())


def samples_ms(fn: Callable[[], Any], *, warmup: float = 25, repeat: float = 100) -> list[float]:
    """Times of calls in milliseconds, between device events, the L2 cache cleared before each call.

    Args:
        fn: launches the work; called a few times before anything is timed.
        warmup, repeat: milliseconds to spend on each.

    Returns: of at most `BLOCKS` runs of neighbouring calls the median of each.
    """
    if gpu_rows.is_dry():
        return [_wall_ms(fn) for _ in range(2)]
    from triton.testing import do_bench

    return blocks(do_bench(fn, warmup=int(warmup), rep=int(repeat), return_mode="all"))


def _wall_ms(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return 1e3 * (time.perf_counter() - start)


def in_turns(works: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, list[Any]]:
    """What each work returns in each round; the order rotates, and a round before the first one is not counted."""
    names = list(works)
    found: dict[Key, list[Any]] = {name: [] for name in names}
    for number in range(rounds + 1):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            value = works[name]()
            if number:
                found[name].append(value)
    return found


def blocks(times: Sequence[float]) -> list[float]:
    """The medians of neighbouring values: as many as `BLOCKS`, or each value where there are fewer."""
    size = math.ceil(len(times) / BLOCKS)
    return [statistics.median(times[start : start + size]) for start in range(0, len(times), size)]


def median_ms(fn: Callable[[], Any]) -> float:
    """Median time of a call in milliseconds (`samples_ms`)."""
    return statistics.median(samples_ms(fn))


def medians(works: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """A row's times: column → median of its call in milliseconds, and what they are medians of under `samples`."""
    samples = {column: samples_ms(work) for column, work in works.items()}
    return {**{column: statistics.median(found) for column, found in samples.items()}, "samples": samples}


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy, counting those read and those written."""
    nbytes = 2**20 if gpu_rows.is_dry() else 2**31
    source = torch.empty(nbytes, dtype=torch.int8, device=need_gpu()).random_()
    target = torch.empty_like(source)
    return 2 * nbytes / (median_ms(lambda: target.copy_(source)) * 1e-3)


def matmul_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP per second of a large square product on random data."""
    size = 128 if gpu_rows.is_dry() else 8192
    a, b = (torch.randn(size, size, device=need_gpu(), dtype=dtype) for _ in range(2))
    return 2 * size**3 / (median_ms(lambda: a @ b) * 1e-3)


def environment() -> dict[str, Any]:
    """What a figure depends on: device, versions, revision, date."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"CPU ({_processor()}), {torch.get_num_threads()} threads",
        "cuda": torch.version.cuda,
        **{package: version(package) for package in ("torch", "triton", "deepspeed", "transformers", "peft")},
        "python": platform.python_version(),
        "revision": _revision(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The CPU's name if the system knows it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _revision() -> str | None:
    """The git revision of this file's checkout, with "+" when the tree differs from it; None where there is no git.

    Results do not count: a script that writes after every run would find its own.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    changed = ["status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results"]
    try:
        revision, differs = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["describe", "--always", "--exclude=*"], changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+" if differs else "")


# --- command lines and results --------------------------------------------------------------------------------------

NOT_MEASURED = ("folder", "label")  # options that say only where the results go


class Parser(argparse.ArgumentParser):
    """A benchmark's command line, with --folder and --label; a mistake is a ConfigError."""

    def __init__(self, doc: str | None) -> None:
        how: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(description=doc, **how)
        self.add_argument("--folder", type=Path, default=RESULTS, help="where the results go")
        self.add_argument("--label", default="", help="end of the result's name, to keep it apart from others")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; see --help")


def demo_model() -> str:
    """The folder of SmolLM2-135M; ConfigError where it cannot be fetched."""
    from hdpissa.launch.demo_model import DemoModelError, ensure_demo_model

    try:
        return str(ensure_demo_model())
    except DemoModelError as error:
        raise ConfigError(f"the demo model cannot be fetched: {error}") from None


def run(main: Callable[[], int | None]) -> int:
    """`main` with a user's mistakes as one line and exit code 2, a failed run as one and exit code 1."""
    try:
        return main() or 0
    except ConfigError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except FailedRunError as error:
        print(f"a run failed: {error}", file=sys.stderr)
        return 1


def configuration_of(args: argparse.Namespace) -> dict[str, Any]:
    """A script's full arguments as JSON holds them; of a path its last part, because the rest is this machine's."""
    found: dict[str, Any] = {}
    for key, value in vars(args).items():
        if key not in NOT_MEASURED:
            path = isinstance(value, Path) or (isinstance(value, str) and key.startswith("model"))
            found[key] = Path(value).name if path else value
    return json.loads(json.dumps(found))


def write(
    name: str,
    args: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    note: str = "",
    *,
    identity: Sequence[str],
    headline: str = "",
    **configuration: Any,
) -> Path:
    """Writes <name>.json and <name>.md, prints the table, and returns the Markdown file.

    Args:
        args: the command line: folder, label, and what the run was started with.
        rows: column → value; a row may lack columns. `samples`, where a row has it, is column → the raw values of which
            that column is the median: compare.py takes the noise from them. Where the configuration or the row has
            `rounds`, they are round after round, equally many of each.
        columns: what the table shows, in this order. JSON keeps everything that the rows hold.
        note: one paragraph: what was measured, how to read it, which limit holds.
        identity: the columns that identify a row, for compare.py.
        headline: what was found, in one line; suite.py prints it.
        configuration: what else the figures are of.
    """
    name = f"{name}_{args.label}" if args.label else name
    where = environment()
    content = {
        "name": name, "note": note, "environment": where, "configuration": configuration_of(args) | configuration,
        "headline": headline, "identity": list(identity), "rows": [dict(row) for row in rows],
    }  # fmt: skip
    args.folder.mkdir(parents=True, exist_ok=True)
    atomic.write_json(args.folder / f"{name}.json", content)
    table = gpu_rows.table(rows, columns)
    tail = ", ".join(f"{key} {value}" for key, value in where.items() if value is not None)
    target = args.folder / f"{name}.md"
    atomic.write_text(target, "\n\n".join(filter(None, [f"# {name}", note, table, tail])) + "\n")
    print(table, flush=True)
    return target
