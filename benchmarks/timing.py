"""How benchmarks time a GPU, what its ceilings are, and where results go.

`write` leaves <name>.json and <name>.md in `benchmarks/results/`, or in the folder that HDPISSA_RESULTS names: the
rows, a sentence on how to read them, and the environment they were measured in.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(os.environ.get("HDPISSA_RESULTS") or Path(__file__).parent / "results")


def need_gpu() -> torch.device:
    """The GPU that torch sees; without one the script ends here, in one line and with exit code 2."""
    if not torch.cuda.is_available():
        print(f"{Path(sys.argv[0]).name}: no GPU here (torch.cuda.is_available() is False)", file=sys.stderr)
        raise SystemExit(2)
    return torch.device("cuda", torch.cuda.current_device())


def median_ms(fn: Callable[[], Any], *, warmup: float = 25, repeat: float = 100) -> float:
    """Median time of a call in milliseconds, between device events, the L2 cache cleared before each call.

    Args:
        fn: launches the work; called a few times before anything is timed.
        warmup, repeat: milliseconds to spend on each.
    """
    from triton.testing import do_bench

    return do_bench(fn, warmup=int(warmup), rep=int(repeat), return_mode="median")


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
    """The git revision of this file's checkout, with "+" when the tree differs from it; None where there is no git."""
    try:
        describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


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
) -> Path:
    """Writes <name>.json and <name>.md, prints the table, and returns the Markdown file.

    Args:
        rows: column → value; a row may lack columns. `samples`, where a row has it, is column → the raw values of which
            that column is a summary: compare.py takes the noise from them.
        columns: what the table shows, in this order. JSON keeps everything that the rows hold.
        note: one paragraph: what was measured, how to read it, which limit holds.
        identity: the columns that tell one row from another, for compare.py.
        configuration: what the whole run was started with.
        pictures: files in the same folder, shown below the table.
        headline: what was found, in one line; suite.py prints it.
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
    print(table, flush=True)
    return target


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A Markdown table; floats with four significant digits."""
    lines: list[list[str]] = [list(columns), ["---"] * len(columns)]
    lines += [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
