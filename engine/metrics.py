"""What a run leaves behind for people and programs: metrics.jsonl, run.json, run_state.json, one line per step.

Rank 0 alone writes; the other ranks hold a recorder that does nothing, so that the loop has no branches. One
exception: when a run fails, rank 0 may be what was lost, so then others write run_state.json, too.
Figures of a step: `tokens` are input tokens of all ranks without padding, `mfu` counts forward plus the input
gradient (4 FLOP per weight and token, the floor of a frozen base) against the device's published dense
bf16 peak, and is null where that is unknown (CPU).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import pulse
from .errors import StopError

MANY = 50  # weights; fewer are decomposed before anybody wonders

# Dense bf16 peak in FLOP/s, by the vendors' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "MI300X": 1307e12}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device by its name; None when it is not in the table."""
    return next((flops for key, flops in PEAK_FLOPS.items() if key in device_name), None)


def write_json(path: Path, content: Mapping[str, Any], *, rank: int = 0) -> None:
    """Writes a JSON file that a reader never sees half-written, whatever other ranks are writing there."""
    temporary = path.with_name(f".{path.name}.{rank}.partial")
    temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")
    os.replace(temporary, path)


def keep_rows(path: Path, steps: int) -> None:
    """Leaves in a metrics file the rows up to a step, none for 0: a resumed run writes the later ones again."""
    kept = []
    for line in path.read_text().splitlines() if steps and path.exists() else []:
        try:
            if json.loads(line)["step"] <= steps:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # a run that was killed may have left half a line
            continue
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def finite_or_none(value: float) -> float | None:
    """JSON has no nan and no infinity."""
    return value if math.isfinite(value) else None


class Recorder:
    """A rank's record of a run; rank 0's is the one that is written.

    Args:
        folder: output folder; on rank 0 it exists.
        total_steps: optimizer steps planned.
        weights: parameters of the model, for `mfu`.
        device_name, devices: for `mfu`.
        rank: whose it is.
    """

    def __init__(
        self, folder: Path, *, total_steps: int, weights: int, device_name: str, devices: int, rank: int
    ) -> None:
        quiet = rank != 0
        self.folder, self.total_steps, self.rank, self.quiet = folder, total_steps, rank, quiet
        self._flops_per_token = 4 * weights
        peak = peak_flops(device_name)
        self._peak = peak * devices if peak else None
        self._last = time.perf_counter()
        self.steps_done = 0
        self._file: IO[str] | None = None if quiet else (folder / "metrics.jsonl").open("a", buffering=1)
        self._console = Console(quiet=quiet)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("step", total=total_steps, figures="")
        self._slices = Progress(
            TextColumn("slices of weights"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[name]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=self._progress.disable,
            transient=True,
        )
        self._sliced = self._slices.add_task("slices", name="")

    def slices(self, name: str, done: int, total: int) -> None:
        """How far the decomposition is: a bar with the time left, or ten lines where there is no terminal."""
        if done == 1:
            self._begin = time.perf_counter()
            self._slices.reset(self._sliced, total=total)
            self._slices.start()
        self._slices.update(self._sliced, completed=done, name=name)
        if done == total:
            self._slices.stop()
        elif not self._console.is_terminal and total >= MANY and done * 10 // total > (done - 1) * 10 // total:
            left = (time.perf_counter() - self._begin) * (total - done) / max(1, done - 1)
            self.say(f"slices of {done:>4}/{total} weights  left {_clock(left)}")

    def start(self) -> None:
        """Starts the clock of the first step and the bar."""
        self._progress.start()
        self._last = time.perf_counter()

    def resume_clock(self) -> None:
        """Leaves out what happened since the last step (evaluation, generation)."""
        self._last = time.perf_counter()

    def step(self, figures: Mapping[str, Any], *, log: bool) -> dict[str, Any]:
        """Records an optimizer step.

        Args:
            figures: at least step, loss, learning_rate, tokens.
            log: whether it is written and printed; the clock runs in any case.

        Returns: the row.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.steps_done = figures["step"]
        row = {name: finite_or_none(v) if isinstance(v, float) else v for name, v in figures.items()}
        row["step_time_s"] = round(seconds, 6)
        row["tokens_per_second"] = round(figures["tokens"] / seconds, 2)
        row["mfu"] = self._mfu(figures["tokens"] / seconds)
        if log:
            self._write(row)
            self._show(row, seconds)
            self.state("running", figures["step"])
        self._progress.update(self._task, completed=figures["step"], figures=_short(row))
        return row

    def _mfu(self, tokens_per_second: float) -> float | None:
        if self._peak is None:
            return None
        return round(self._flops_per_token * tokens_per_second / self._peak, 4)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Records an evaluation: at least step, eval_loss and perplexity."""
        self._write({name: finite_or_none(v) if isinstance(v, float) else v for name, v in row.items()})
        self.say(f"eval   step {row['step']:>5}  eval_loss {row['eval_loss']:.4f}  perplexity {row['perplexity']:.2f}")

    def integrity(self, row: Mapping[str, Any]) -> None:
        """Records a check for silent corruption that the run has passed; warns of slices with an odd update."""
        self._write(row)
        for odd in row["outliers"]:
            norms = row["delta_norms"]
            self.say(
                f"warning: step {row['step']}: the update of slice {odd} (rank {row['ranks'][odd]}) has norm "
                f"{norms[odd]:.2e}, those of all slices {', '.join(f'{n:.2e}' for n in norms[:16])}; if this goes on, "
                f"look at that device"
            )

    def say(self, text: str) -> None:
        """Prints a line above the bar, on rank 0 only."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._file is not None:
            with pulse.alone("metrics"):
                self._file.write(json.dumps(row) + "\n")

    def _show(self, row: Mapping[str, Any], seconds: float) -> None:
        if self._console.is_terminal:
            return
        left = (self.total_steps - row["step"]) * seconds
        self.say(f"step {row['step']:>5}/{self.total_steps}  {_short(row)}  left {_clock(left)}")

    def save_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file of the output folder, whole or not at all."""
        if not self.quiet:
            with pulse.alone(name):
                write_json(self.folder / name, content)

    def state(self, state: str, step: int, message: str = "") -> None:
        """run_state.json: "running", "finished", "preempted" or "failed", at which step, and why.

        Launchers can return 0 for a run that was killed, so this file is what says how a run ended.
        """
        self.steps_done = step
        self.save_json("run_state.json", _state(state, step, message))

    def failed(self, error: BaseException, *, lost: bool = False) -> None:
        """run_state.json: "failed", after how many steps, and the error; from any rank.

        The cause must stand there, not what followed from it: rank 0's own error always counts, another rank's
        unless somebody has written already, and so does that peers were lost (`lost`). Ranks on hosts that do not
        share the folder each write their own.
        """
        path = self.folder / "run_state.json"
        if (self.rank or lost) and _says_failed(path):
            return
        text = str(error) if lost or isinstance(error, StopError) else f"{type(error).__name__}: {error}"
        message = text if lost or self.rank == 0 or isinstance(error, StopError) else f"rank {self.rank}: {text}"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, _state("failed", self.steps_done, message), rank=self.rank)

    def close(self) -> None:
        """Ends the bars and closes the file."""
        self._slices.stop()
        self._progress.stop()
        if self._file is not None:
            self._file.close()


def _state(state: str, step: int, message: str) -> dict[str, Any]:
    return {"state": state, "step": step, "message": message}


def _says_failed(path: Path) -> bool:
    try:
        return json.loads(path.read_text())["state"] == "failed"
    except (OSError, ValueError, KeyError):
        return False


def _short(row: Mapping[str, Any]) -> str:
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    mfu = f"  mfu {row['mfu']:.1%}" if row["mfu"] is not None else ""
    skipped = "" if row.get("applied", True) else "  SKIPPED"
    return f"loss {loss}  lr {row['learning_rate']:.2e}  {row['tokens_per_second']:.0f} tokens/s{mfu}{skipped}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
