"""How benchmarks time a GPU, what its ceilings are, and where results go.

`write` leaves <name>.json and <name>.md in `benchmarks/results/`, or in the folder that HDPISSA_RESULTS names: the
rows, a sentence on how to read them, what the run was started with, and the environment it was measured in.

A result of the same name is replaced; --label TEXT writes beside it.
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
from typing import Any

import torch

from hdpissa.benchmarks.gpu import gpu_rows
from hdpissa.engine.errors import ConfigError

BLOCKS = 20
# Of the scripts that measure once in one process: how much another run of the same code would differ is not known.
ONE_RUN = {"rounds": 1}
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
def copy_bandwidth(nbytes: int = 2**31) -> float:
    """Bytes per second of a device-to-device copy, counting those read and those written."""
    source = torch.empty(nbytes, dtype=torch.int8, device=need_gpu()).random_()
    target = torch.empty_like(source)
    return 2 * nbytes / (median_ms(lambda: target.copy_(source)) * 1e-3)


def matmul_rate(dtype: torch.dtype = torch.bfloat16, size: int = 8192) -> float:
    """FLOP per second of a large square product on random data."""
    a, b = (torch.randn(size, size, device=need_gpu(), dtype=dtype) for _ in range(2))
    return 2 * size**3 / (median_ms(lambda: a @ b) * 1e-3)


def environment() -> dict[str, Any]:
    """What a figure depends on: device, versions, revision, date."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"CPU ({_processor()}), {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "deepspeed": _version("deepspeed"),
        "transformers": _version("transformers"),
        "peft": _version("peft"),
        "python": platform.python_version(),
        "revision": _revision(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The CPU's name where the system tells it, else its architecture."""
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
        told = [
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["describe", "--always", "--exclude=*"], changed)
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return told[0] + ("+" if told[1] else "")


# --- results --------------------------------------------------------------------------------------------------------

# Of a command line, what is no part of what is measured: where results go, and what scripts tell their own ranks.
ELSEWHERE = ("folder", "name", "label", "out", "local_rank", "cache", "path")


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """--folder and --label."""
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--label", default="", help="end of the result's name, to stand beside others")


def labelled(name: str, label: str) -> str:
    """The name of a result with its label, where it has one."""
    return f"{name}_{label}" if label else name


def configuration_of(args: argparse.Namespace) -> dict[str, Any]:
    """A script's full arguments as JSON holds them. Of a path stays its last part: the rest is this machine's."""
    found: dict[str, Any] = {}
    for key, value in vars(args).items():
        if key not in ELSEWHERE:
            text = isinstance(value, Path) or (isinstance(value, str) and key.startswith("model"))
            found[key] = Path(value).name if text else value
    return json.loads(json.dumps(found))


def result_of(name: str, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """A result's name with its label, and its configuration."""
    return labelled(name, args.label), configuration_of(args)


def run(main: Callable[[], int | None]) -> int:
    """`main` with a user's mistakes as one line and exit code 2."""
    try:
        return main() or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def write(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    note: str = "",
    *,
    folder: Path = RESULTS,
    identity: Sequence[str] = (),
    configuration: Mapping[str, Any] | None = None,
    pictures: Sequence[str] = (),
    headline: str = "",
    show: bool = True,
) -> Path:
    """Writes <name>.json and <name>.md, prints the table, and returns the Markdown file.

    Args:
        rows: column → value; a row may lack columns. `samples`, where a row has it, is column → the raw values of which
            that column is the median or mean: compare.py takes the noise from them. Where the configuration or, before
            it, the row has `rounds`, they are round after round, equally many of each. `weights`, where a row has it,
            names what its samples are of, one by one: then each is compared with its namesake.
        columns: what the table shows, in this order. JSON keeps everything that the rows hold.
        note: one paragraph: what was measured, how to read it, which limit holds.
        identity: the columns that tell one row from another, for compare.py.
        configuration: what the whole run was started with (`configuration_of`).
        pictures: files in the same folder, shown below the table.
        headline: what was found, in one line; suite.py prints it. show: whether the table is printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = environment()
    content: dict[str, Any] = {
        "name": name,
        "note": note,
        "environment": where,
        "configuration": dict(configuration or {}),
    }
    content |= {"headline": headline, "identity": list(identity), "rows": [dict(row) for row in rows]}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    table = markdown(rows, columns)
    tail = ", ".join(f"{key} {value}" for key, value in where.items() if value is not None)
    target = folder / f"{name}.md"
    shown = "\n".join(f"![{Path(picture).stem}]({picture})" for picture in pictures)
    target.write_text("\n\n".join(filter(None, [f"# {name}", note, table, shown, tail])) + "\n")
    if show:
        print(table, flush=True)
    return target


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A Markdown table; floats with four significant digits."""
    lines: list[list[str]] = [list(columns), ["---"] * len(columns)]
    lines += [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
