"""Figures of a run and the files that hold them.

Figures of a step: `tokens` are input tokens of all ranks without padding, `mfu` counts forward plus the input
gradient (4 FLOP per token and weight that it meets, the floor of a frozen base) against the device's published dense
bf16 peak, and is null where that is unknown (CPU).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdpissa.engine.files import atomic

AFTER_TRAINING = "after training"  # `when` a sample is of the model that is exported, whichever step that has
# Dense bf16 peak in FLOP/s, by the vendors' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "MI300X": 1307e12}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device by its name; None when it is not in the table."""
    return next((flops for key, flops in PEAK_FLOPS.items() if key in device_name), None)


def keep_rows(path: Path, steps: int) -> None:
    """Leaves in a file of rows those up to a step, none for 0: a resumed run writes the later ones again.

    The same holds for rows of the end of the run (samples `when` AFTER_TRAINING), whatever their step.
    """
    rows = _whole_lines(path) if steps else ()
    kept = [line + "\n" for line, row in rows if row["step"] <= steps and row.get("when") != AFTER_TRAINING]
    atomic.write_text(path, "".join(kept))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file; none where there is no file."""
    return [row for _, row in _whole_lines(path)]


@dataclass(frozen=True)
class RunFiles:
    """What a run has left in its output folder; what is not there, or is no JSON, is empty.

    Attributes:
        run, state: run.json, run_state.json. rows: of metrics.jsonl, in order.
    """

    folder: Path
    run: dict[str, Any]
    state: dict[str, Any]
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        run, state = (read_json(folder / name) for name in ("run.json", "run_state.json"))
        return cls(folder, run, state, read_rows(folder / "metrics.jsonl"))

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the trainer, and of train.py."""
        return {**self.run.get("script", {}), **self.run.get("arguments", {})}

    def having(self, name: str) -> list[dict[str, Any]]:
        """The rows with this field: `loss` is of optimizer steps, `eval_loss` of evaluations."""
        return [row for row in self.rows if name in row]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, KeyError, TypeError):  # a run that was killed may have left half a line
            continue
        yield line, row


def finite_or_none(value: Any) -> Any:
    """JSON has no nan and no infinity; everything else as it is, in lists too."""
    if isinstance(value, list):
        return [finite_or_none(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finite_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row that is JSON."""
    return {name: finite_or_none(value) for name, value in row.items()}


def counted(number: int, what: str) -> str:
    """ "1 slice", "2 slices"."""
    return f"{number} {what}{'s' * (number != 1)}"
