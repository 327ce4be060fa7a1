"""What a run left in its output folder, read back: for its pictures, its report and its model card.

Nothing here has to be there: a run may have been killed in the middle of a line, be of an earlier version, or not have
got far. What cannot be read counts as absent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AFTER_TRAINING = "after training"  # `when` a sample is of the model that is exported, whichever step that has
EXTRA = "report.json"  # what a report needs and no other file has: warnings, spectra
EXPORTS = {"model": ("hf", "both"), "adapter": ("peft", "both")}  # folder → what --export_format then was
EXPORT = "hdpissa_export.json"
SAMPLES = ("samples.jsonl", "sample_before_training.json", "sample_after_training.json")


@dataclass(frozen=True)
class Sample:
    """A generated answer. `when`: "before training", "after step 20"; `reference`: the right one, where it is known."""

    when: str
    prompt: str
    answer: str
    reference: str = ""


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        run, state, extra: run.json, run_state.json, report.json; empty where there is none.
        rows: of metrics.jsonl, in order. steps, evaluations: those of optimizer steps, and those with an eval_loss.
        samples: answers, the oldest first. exports: folder name → its hdpissa_export.json.
    """

    folder: Path
    run: dict[str, Any]
    state: dict[str, Any]
    extra: dict[str, Any]
    rows: list[dict[str, Any]]
    samples: list[Sample]
    exports: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        run, state, extra = (_json(folder / name) for name in ("run.json", "run_state.json", EXTRA))
        wanted = _mapping(run.get("arguments")).get("export_format", "both")  # others are an earlier run's
        exports = {name: _json(folder / name / EXPORT) for name, formats in EXPORTS.items() if wanted in formats}
        found = {name: content for name, content in exports.items() if content}
        return cls(folder, run, state, extra, _lines(folder / "metrics.jsonl"), _samples(folder), found)

    @property
    def arguments(self) -> dict[str, Any]:
        return _mapping(self.run.get("arguments"))

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "loss" in row]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "eval_loss" in row]

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of all rows that have it; nan where it was not finite."""
        rows = [row for row in self.rows if name in row]
        return [float(row["step"]) for row in rows], [number(row[name]) for row in rows]

    def per_slice(self) -> dict[str, tuple[list[float], list[list[float]]]]:
        """Fields with a number per slice → (steps, a list of all slices' numbers per step)."""
        found: dict[str, tuple[list[float], list[list[float]]]] = {}
        for row in self.rows:
            for name, value in row.items():
                if (name.startswith("slice_") or name == "delta_norms") and isinstance(value, list) and value:
                    steps, values = found.setdefault(name, ([], []))
                    if not values or len(values[0]) == len(value):
                        steps.append(float(row["step"]))
                        values.append([number(v) for v in value])
        return found

    def skipped(self) -> list[dict[str, Any]]:
        """Steps that changed nothing."""
        return [row for row in self.steps if row.get("applied") is False]

    def warnings(self) -> list[str]:
        """What the run was warned of, and what its files say that a person should look at."""
        found = [str(text) for text in _list(self.extra.get("warnings"))]
        if skipped := self.skipped():
            last = skipped[-1]
            some = (
                f"{len(skipped)} steps were skipped, the last is" if len(skipped) > 1 else "one step was skipped, it is"
            )
            found.append(f"{some} {last['step']}: {last.get('refusal', '')}")
        for row in self.rows:
            for odd in _list(row.get("outliers")):
                found.append(f"step {row['step']}: the update of slice {odd} is of quite another size than the others'")
        if self.state.get("state") not in (None, "finished"):
            found.append(f"the run is {self.state['state']}: {self.state.get('message') or 'no message'}")
        for name, report in self.exports.items():
            if report.get("unknown"):
                found.append(f"{name}/: the residual is unknown: {report['unknown']}")
        return list(dict.fromkeys(found))


def counted(number: int, what: str) -> str:
    """ "1 slice", "2 slices"."""
    return f"{number} {what}{'s' * (number != 1)}"


def number(value: Any) -> float:
    """A JSON number as float; null, and whatever is none, as nan."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _json(path: Path) -> dict[str, Any]:
    try:
        return _mapping(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file that have a step."""
    found = []
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a run that was killed may have left half a line
            continue
        if isinstance(row, dict) and math.isfinite(number(row.get("step"))):
            found.append(row)
    return found


def _samples(folder: Path) -> list[Sample]:
    rows = [(_when(row), row) for row in _lines(folder / SAMPLES[0])]
    if not rows:
        rows = [(" ".join(name.removesuffix(".json").split("_")[1:]), _json(folder / name)) for name in SAMPLES[1:]]
    whole = [(when, row) for when, row in rows if "prompt" in row and "answer" in row]
    return [Sample(when, str(r["prompt"]), str(r["answer"]), str(r.get("reference") or "")) for when, r in whole]


def _when(row: Mapping[str, Any]) -> str:
    """The best weights may be those of a step that was asked before; what 0.1 has written says the step alone."""
    step = row["step"]
    if row.get("when") == AFTER_TRAINING:
        return f"after training (the weights of step {step})"
    return f"after step {step}" if step else "before training"


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
