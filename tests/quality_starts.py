"""How tests start `quality.py`, and what they read of its result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hdpissa.benchmarks import quality, task


def start(monkeypatch: Any, *command: object) -> int:
    """Its exit code with this command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, command)])
    return task.run(quality.main)


def table(folder: Path) -> dict[str, dict]:
    """The rows that it has written, by arm."""
    return {row["arm"]: row for row in json.loads((folder / "out" / "quality.json").read_text())["rows"]}
