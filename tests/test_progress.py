"""How far long work is: lines now and then where there is no terminal, a bar that goes away where there is one."""

from __future__ import annotations

import io
from types import SimpleNamespace

import datasets
import pytest
import torch
from rich.console import Console
from tiny import tiny_llama

from hdpissa.engine import progress
from hdpissa.engine.batches import EvalBatches
from hdpissa.engine.display import Display
from hdpissa.engine.evaluate import mean_loss
from hdpissa.engine.generation import generate
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


def test_a_loss_tells_of_its_batches():
    rows = datasets.Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 5)
    batches, seen = EvalBatches(rows, rank=0, world_size=1, batch_size=2, pad_token_id=0), []
    mean_loss(tiny_llama(), batches, torch.device("cpu"), lambda *parts: seen.append(parts))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("prompts", "seen"), [(5, [(0, 5), (2, 5), (4, 5), (5, 5)]), (0, [])])
def test_answers_tell_of_their_prompts(prompts, seen):
    model, found = tiny_llama(), []
    model.generation_config = SimpleNamespace(eos_token_id=None)
    model.generate = lambda input_ids, **_: input_ids
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=0, batch_decode=lambda new, **_: [""] * len(new))
    limits = {"batch_size": 2, "max_new_tokens": 1, "device": torch.device("cpu")}
    generate(model, tokenizer, [[2, 3]] * prompts, **limits, progress=lambda *parts: found.append(parts))
    assert found == seen


def test_whatever_ends_an_evaluation_the_bar_is_gone(monkeypatch):
    """rich hides the cursor while there is one."""
    from hdpissa.launch import evaluate_dataset

    monkeypatch.setattr("rich.console.Console.is_terminal", property(lambda self: True))
    shown = []

    def work():
        with evaluate_dataset._progress("answers") as progress:
            shown.append(progress._bars.live)
            progress(0, 3)
            shown.append(progress._bars.live.is_started)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert shown[1]
    assert not shown[0].is_started
