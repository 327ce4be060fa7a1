"""How far a long piece of work is: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich import progress as rich
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn

PATIENCE = 5.0  # seconds of work before it is told of in a line, and between two lines

Progress = Callable[[int, int], None]  # called with how many parts are done, and of how many


def untold(done: int, total: int) -> None:
    """Progress that nobody is told of."""


class Work:
    """A piece of work in a known number of parts, which may be done again. Call it with what is done.

    Args:
        title: what the parts are, as "answers". console: where lines go.
        bars: what shows it on a terminal, perhaps among others; disabled: lines instead.
    """

    def __init__(self, title: str, console: Console, bars: rich.Progress) -> None:
        self._title, self._console, self._bars = title, console, bars
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int, name: str = "") -> None:
        """`done` of `total` parts are done; the first call begins the work, the last part clears its bar away.

        Args:
            name: of what was done last.
        """
        if self._task is None:
            self._begin(done, total)
        elif self._bars.disable:
            self._tell(done, total)
        self._bars.update(self._task, completed=done, figures=name)  # type: ignore[arg-type]
        if done == total:
            self.stop()

    def stop(self) -> None:
        """Clears the bar away."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
            if self._alone:
                self._bars.stop()

    def _begin(self, done: int, total: int) -> None:
        self._task = self._bars.add_task(self._title, total=total, figures="")
        self._alone = not self._bars.disable and not self._bars.live.is_started
        self._bars.start()
        self._first, self._since = done, time.perf_counter()
        self._told = self._since

    def _tell(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self._told >= PATIENCE and self._first < done < total:
            self._told = now
            left = clock((now - self._since) * (total - done) / (done - self._first))
            self._console.print(f"{self._title} {done:>4}/{total}  left {left}", highlight=False, soft_wrap=True)


def make_bars(console: Console, *, off: bool) -> rich.Progress:
    """Of every task its description, parts, bar, `figures` and time left."""
    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    return rich.Progress(*columns, console=console, disable=off)


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
