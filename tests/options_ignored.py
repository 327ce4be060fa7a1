"""Does the test of an option fail when the option is ignored? The table of options_held.py, put to the proof.

    python tests/options_ignored.py [WORD ...]

Every option is made ineffective in turn (ignored/sitecustomize.py: in the test's process and in all that it starts),
and the test that is said to hold it is run. It must fail. WORDs choose: a command, an option, or a part of one. About
half an hour of CPU time in all; exit code 1 when a test has passed all the same.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import options_held

TESTS = Path(__file__).resolve().parent
PASSED, FAILED = 0, 1  # pytest's exit codes


def chosen(words: list[str]) -> Iterator[tuple[str, str, str]]:
    """(command, option, test)"""
    for command, held in options_held.HELD.items():
        for option, test in held.items():
            if not words or any(word == command if word in options_held.HELD else word in option for word in words):
                yield command, option, test


def run(option: str, test: str, log: Path) -> int:
    """pytest's exit code for the test with the option ignored; in a fork, which has imported everything."""
    pid = os.fork()
    if not pid:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os.environ |= {"HDPISSA_IGNORED": option, "PYTHONPATH": str(TESTS / "ignored")}
        sys.path.insert(0, str(TESTS / "ignored"))
        sys.modules.pop("sitecustomize", None)
        import pytest
        import sitecustomize  # noqa: F401

        file, _, function = test.partition("::")
        os._exit(pytest.main([f"{TESTS / file}.py::{function}", "-x", "-q", "-p", "no:cacheprovider"]))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(words: list[str]) -> int:
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401  (before the forks: a second each)
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    passed, count = [], 0
    with tempfile.TemporaryDirectory() as name:
        for command, option, test in chosen(words):
            start, log = time.monotonic(), Path(name) / "log"
            code = run(option, test, log)
            verdict = {FAILED: "fails", PASSED: "PASSES"}.get(code, f"pytest's exit code {code}")
            print(f"{command} {option}: {test} {verdict} ({time.monotonic() - start:.0f} s)", flush=True)
            count += 1
            said = log.read_text().splitlines()
            print(f"    {next((line for line in said if line.startswith('E  ')), said[-1])[:150]}", flush=True)
            if code != FAILED:
                passed.append(f"{command} {option}")
    print(f"{count - len(passed)} of {count} options: the test fails when the option is ignored")
    return 1 if passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
