"""How far long work is: lines now and then where there is no terminal, a bar that goes away where there is one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from hdpissa.engine import progress
from hdpissa.engine.display import Display
from hdpissa.engine.progress import Work, make_bars


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def lines(clock, seconds_a_part: float, parts: int = 10) -> list[str]:
    console = Console(file=io.StringIO(), width=40)
    work = Work("answers", console, make_bars(console, off=True))
    for done in range(parts + 1):
        work(done, parts)
        clock[0] += seconds_a_part
    return console.file.getvalue().splitlines()


def test_short_work_says_nothing(clock):
    assert lines(clock, 0.4) == []


def test_long_work_says_what_is_left(clock):
    assert lines(clock, 60.0, parts=4) == [
        "answers    1/4  left 0:03:00",
        "answers    2/4  left 0:02:00",
        "answers    3/4  left 0:01:00",
    ]


def test_not_more_than_a_line_in_five_seconds(clock):
    assert lines(clock, 2.0) == [
        "answers    3/10  left 0:00:14",
        "answers    6/10  left 0:00:08",
        "answers    9/10  left 0:00:02",
    ]


def test_time_is_counted_from_where_it_begins(clock):
    console = Console(file=io.StringIO(), width=40)
    work = Work("slices of weights", console, make_bars(console, off=True))
    work(50, 100)
    clock[0] += 10
    work(60, 100)
    assert console.file.getvalue() == "slices of weights   60/100  left 0:00:40\n"


def test_a_bar_comes_and_goes(monkeypatch):
    """On a terminal; beside the bar of the steps, and before that has begun."""
    monkeypatch.setattr("rich.console.Console.is_terminal", property(lambda self: True))
    display = Display(total_steps=3, quiet=False)
    bars = display._bars
    display.work("slices of weights")(1, 2, "q_proj")
    assert bars.live.is_started
    assert [task.description for task in bars.tasks] == ["slices of weights"]
    display.work("slices of weights")(2, 2)
    assert not bars.live.is_started
    assert not bars.tasks
    display.start()
    for _ in range(2):  # evaluations come again
        display.work("answers")(0, 2)
        assert [task.description for task in bars.tasks] == ["step", "answers"]
        display.work("answers")(2, 2)
        assert [task.description for task in bars.tasks] == ["step"]
        assert bars.live.is_started
    display.stop()


# --- who tells of it -------------------------------------------------------------------------------
