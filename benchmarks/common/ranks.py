"""Starts a benchmark's own ranks through the real launcher, one thread each, and hands back what rank 0 found."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def add_options(parser: argparse.ArgumentParser) -> None:
    """--out and --local_rank, which a script that starts itself in ranks has for them."""
    parser.add_argument("--out", type=Path, help="set by the script itself, for the ranks")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")


def launch(script: str, ranks: int, *arguments: object) -> Any:
    """`deepspeed --num_accelerators RANKS script arguments… --out FILE`; the JSON that rank 0 left in FILE.

    Args:
        script: the file; its own output goes to stderr, so that tables stay alone on stdout.

    Raises:
        subprocess.CalledProcessError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        out = Path(folder, "out.json")
        line = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
        line += ["--master_port", str(port), script, *map(str, arguments), "--out", str(out)]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed looks for ninja there
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PATH": path}
        subprocess.run(line, check=True, stdout=sys.stderr, env=environment)
        return json.loads(out.read_text())


def answer(out: Path | None, found: Any) -> None:
    """What a rank's part calls in the end: rank 0 leaves it where `launch` looks."""
    if out is not None and int(os.environ.get("RANK", "0")) == 0:
        out.write_text(json.dumps(found))
