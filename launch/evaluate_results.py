"""What evaluate.py leaves in --output_path: evaluation.json, and answers.jsonl where rows were asked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hdpissa.engine.errors import ConfigError


def check_folder(path: str | None) -> None:
    """Refuses what cannot become a folder, before an hour of work is to be written there."""
    if path is None:
        return
    folder = Path(path).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        raise ConfigError(f"--output_path {path}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"--output_path {path}: {there} must be writable; give another folder")


def write(path: str, figures: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    """Both files. ConfigError where the folder cannot be written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "evaluation.json", [figures])
        if answers:
            _write(folder / "answers.jsonl", answers)
    except OSError as error:
        raise ConfigError(
            f"--output_path {folder}: cannot be written ({error.strerror}); give another folder"
        ) from None


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
