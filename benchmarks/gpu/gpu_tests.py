"""Phase `tests` of gpu.py: the kernel tests, and those of the layers and the engine that use them, a row for each test.

Arguments are pytest's, in place of the files that are run without any.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from hdpissa.benchmarks.gpu import gpu_rows

ROOT = Path(__file__).resolve().parents[2]
NO_GPU_NEEDED = ("test_kernel_aot.py", "test_kernel_benchmarks.py")
# broken on purpose: reads beyond a tensor end a GPU process
BROKEN = ("test_kernel_mutations.py",)
ENGINE = "tests/kernel_tests/test_engine_triton.py"
BESIDE = ("tests/unit/test_shared_input.py", ENGINE)
# of the dry form, which shows that the rows come
DRY = ("tests/kernel_tests/test_kernel_slice_adam.py",)


def files() -> list[str]:
    """Relative to the checkout; those that say most first."""
    if gpu_rows.is_dry():
        return list(DRY)
    kernels = [p.name for p in sorted((ROOT / "tests" / "kernel_tests").glob("test_kernel_*.py"))]
    return [f"tests/kernel_tests/{name}" for name in kernels if name not in (*NO_GPU_NEEDED, *BROKEN)] + list(BESIDE)


class Record:
    """A pytest plugin: a row for each test that has run, and for each that could not."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        row = {"test": report.nodeid.removeprefix("tests/"), "outcome": report.outcome, "seconds": report.duration}
        if report.outcome == "skipped":
            row["why"] = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if report.outcome == "failed":
            row |= {"failed": _reason(report), "traceback": str(report.longrepr)[-4000:]}
        gpu_rows.record(row)

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome == "failed":
            gpu_rows.record({"test": report.nodeid, "outcome": "failed", "seconds": 0.0, "failed": _reason(report)})


def _reason(report: Any) -> str:
    """The error in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr)[:300]


def main() -> int:
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    if gpu_rows.is_dry():
        workers = []
    arguments = sys.argv[1:] or files()
    return int(pytest.main(["-q", "-p", "no:cacheprovider", *workers, *arguments], plugins=[Record()]))


if __name__ == "__main__":
    raise SystemExit(main())
