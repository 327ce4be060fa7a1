"""What a person sees of a run: a bar on a terminal, plain lines elsewhere.

Only rank 0's display says anything. Lines may come from other threads (`reporters`); rich keeps them whole.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

MANY = 50  # weights; fewer are decomposed before anybody wonders


class Display:
    """A rank's display.

    Args:
        total_steps: optimizer steps planned.
        quiet: says nothing at all.
        bar: a bar where there is a terminal; else plain lines there, too.
    """

    def __init__(self, *, total_steps: int, quiet: bool, bar: bool = True) -> None:
        self._total_steps = total_steps
        self._console = Console(quiet=quiet)
        self._plain = not (bar and self._console.is_terminal)
        self._progress = self._make("step", "figures", transient=False, off=quiet or self._plain)
        self._task = self._progress.add_task("step", total=total_steps, figures="")
        self._slices = self._make("slices of weights", "name", transient=True, off=quiet or self._plain)
        self._sliced = self._slices.add_task("slices", name="")
        self._begin = 0.0

    def _make(self, title: str, field: str, *, transient: bool, off: bool) -> Progress:
        columns = (TextColumn(title), MofNCompleteColumn(), BarColumn(), TextColumn(f"{{task.fields[{field}]}}"))
        return Progress(*columns, TimeRemainingColumn(), console=self._console, disable=off, transient=transient)

    def start(self) -> None:
        """Starts the bar of the steps."""
        self._progress.start()

    def stop(self) -> None:
        """Ends the bars."""
        self._slices.stop()
        self._progress.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def slices(self, name: str, done: int, total: int) -> None:
        """How far the decomposition is: a bar with the time left, or ten lines where there is no terminal."""
        if done == 1:
            self._begin = time.perf_counter()
            self._slices.reset(self._sliced, total=total)
            self._slices.start()
        self._slices.update(self._sliced, completed=done, name=name)
        if done == total:
            self._slices.stop()
        elif self._plain and total >= MANY and done * 10 // total > (done - 1) * 10 // total:
            left = (time.perf_counter() - self._begin) * (total - done) / max(1, done - 1)
            self.say(f"slices of {done:>4}/{total} weights  left {clock(left)}")

    def step(self, row: Mapping[str, Any], seconds: float, *, log: bool) -> None:
        """Moves the bar; where there is none, and the step is logged, a line.

        Args:
            seconds: that the step took.
        """
        self._progress.update(self._task, completed=row["step"], figures=short(row))
        if log and self._plain:
            left = (self._total_steps - row["step"]) * seconds
            self.say(f"step {row['step']:>5}/{self._total_steps}  {short(row)}  left {clock(left)}")


def short(row: Mapping[str, Any]) -> str:
    """A step's figures on a line."""
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    mfu = f"  mfu {row['mfu']:.1%}" if row["mfu"] is not None else ""
    memory = f"  mem {row['peak_memory_bytes'] / 2**30:.1f} GiB" if row.get("peak_memory_bytes") else ""
    skipped = "" if row.get("applied", True) else "  SKIPPED"
    speed = f"{row['tokens_per_second']:.0f} tokens/s"
    return f"loss {loss}  lr {row['learning_rate']:.2e}  {speed}{mfu}{memory}{skipped}"


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
