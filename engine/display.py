"""What a person sees of a run: bars on a terminal, plain lines elsewhere.

Only rank 0's display says anything. Lines may come from other threads (`reporters`); rich keeps them whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import TaskID

from .progress import Work, clock, make_bars


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
        self._bars = make_bars(self._console, off=quiet or self._plain)
        self._task: TaskID | None = None
        self._work: dict[str, Work] = {}

    def start(self) -> None:
        """Starts the bar of the steps."""
        self._task = self._bars.add_task("step", total=self._total_steps, figures="")
        self._bars.start()

    def stop(self) -> None:
        """Ends the bars."""
        for work in self._work.values():
            work.stop()
        self._bars.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bars."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def work(self, title: str) -> Work:
        """Of other work than steps, as "slices of weights", how far it is."""
        return self._work.setdefault(title, Work(title, self._console, self._bars))

    def step(self, row: Mapping[str, Any], seconds: float, *, log: bool) -> None:
        """Moves the bar; where there is none, and the step is logged, a line.

        Args:
            seconds: that the step took.
        """
        if self._task is not None:
            self._bars.update(self._task, completed=row["step"], figures=short(row))
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
