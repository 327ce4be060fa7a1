"""Learning rates: each schedule against its formula, and what is wrong with one told in one line."""

from __future__ import annotations

import json
import math

import pytest
import torch
from launch_runs import parsed

from hdpissa.engine import ConfigError
from hdpissa.launch import train_arguments
from hdpissa.launch.train_schedule import check_schedule, make_scheduler, resolve_shares

STEPS, LR = 8, 3e-3


def cosine_with_min_lr(t, span, *, floor=0.1):
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * t / span))


def warmup_stable_decay(t, span, *, decay=3):
    left = span - t
    return 1.0 if left > decay else max(0.0, 0.5 * (1 + math.cos(math.pi * (decay - left) / decay)))


def inverse_sqrt(t, span, *, timescale=4):
    return math.sqrt(timescale / (t + timescale))


def polynomial(t, span, *, end=1e-4, power=2.0):
    return ((LR - end) * (1 - t / span) ** power + end) / LR


FORMULAS = [
    (cosine_with_min_lr, {"min_lr_rate": 0.1}),
    (warmup_stable_decay, {"num_decay_steps": 3}),
    (inverse_sqrt, {"timescale": 4}),
    (polynomial, {"lr_end": 1e-4, "power": 2.0}),
]


@pytest.mark.parametrize(("formula", "kwargs"), FORMULAS, ids=lambda value: getattr(value, "__name__", ""))
def test_schedules(formula, kwargs):
    """Step t has the rate of the formula written here; the keys reach it; from a checkpoint it goes on alike."""
    args = train_arguments.TrainArguments(
        lr_scheduler_type=formula.__name__, lr_scheduler_kwargs=json.dumps(kwargs), warmup_steps=2
    )
    check_schedule(args, LR, STEPS)
    expected = [LR * (t / 2 if t < 2 else formula(t - 2, STEPS - 2)) for t in range(STEPS)]
    for first in (0, 5):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
        scheduler, rates = make_scheduler(args, optimizer, STEPS, first), []
        for _ in range(first, STEPS):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx(expected[first:], rel=1e-9, abs=1e-15)


def test_every_group_has_its_own_peak():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 1.0, "peak_lr": 1.0})
    optimizer.param_groups[1]["lr"] = 0.3  # as a checkpoint leaves it
    make_scheduler(train_arguments.TrainArguments(lr_scheduler_type="linear", warmup_steps=0), optimizer, 10, start=5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([LR / 2, 0.5])


BAD_SCHEDULES = [
    ("cosine_with_min_lr", None, "One of min_lr or min_lr_rate should be set"),
    ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "Only one of min_lr or min_lr_rate"),
    ("cosine_with_min_lr", {"min_lr_rate": "small"}, r"min_lr_rate\": \"small\"}.*correct it"),
    ("polynomial", {"lr_end": -1.0}, "gives -.* times the learning rate in step"),
    ("cosine", {"min_lr": 1e-5}, "cosine has no min_lr; its keys: num_cycles"),
    ("linear", {"power": 2}, "linear has no power; it takes none"),
    ("constant", {"a": 1}, "constant takes none; leave it out"),
    ("constant_with_warmup", {"a": 1}, "constant_with_warmup takes none"),
    ("warmup_stable_decay", None, "needs num_decay_steps; its keys: num_decay_steps, num_stable_steps"),
    ("warmup_stable_decay", {"num_decay_steps": 7}, "are 9 together, more than the run's 8; make num_decay_steps"),
    ("warmup_stable_decay", {"num_decay_steps": 0.5}, "must be integers"),
    ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "steep"}, "Unknown decay type: steep"),
    ("polynomial", {"lr_end": 1.0}, r"lr_end \(1.0\) must be smaller than initial lr"),
    ("cosine", [1], "must be a JSON object"),
    ("cosine", "{min_lr: 1}", "not valid JSON .* quote it as"),
]


@pytest.mark.parametrize(("name", "kwargs", "words"), BAD_SCHEDULES)
def test_bad_schedules(name, kwargs, words):
    text = kwargs if isinstance(kwargs, str) or kwargs is None else json.dumps(kwargs)
    given = {"lr_scheduler_type": name, "warmup_steps": 2, **({"lr_scheduler_kwargs": text} if text else {})}
    with pytest.raises(ConfigError, match=words) as error:
        check_schedule(parsed(**given), LR, STEPS)
    assert "\n" not in str(error.value)


# --- shares of all steps -----------------------------------------------------------------------------


def test_shares_are_steps_rounded_up():
    """As in transformers; whole numbers stay, as integers, and 0 evaluations stay none."""
    args = parsed(eval_steps=0.1, save_steps=0.25, logging_steps=0.001)
    resolve_shares(args, 42)
    assert (args.eval_steps, args.save_steps, args.logging_steps) == (5, 11, 1)
    args = parsed(save_steps=7, logging_steps="1.0")
    resolve_shares(args, 42)
    assert [repr(n) for n in (args.eval_steps, args.save_steps, args.logging_steps)] == ["0", "7", "1"]


def test_shares_have_to_fit_each_other():
    """0.3 is a multiple of 0.1, which floats do not say; what counts is the steps that they are."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    args = parsed(**best, eval_steps=0.1, save_steps=0.3)
    resolve_shares(args, 40)
    assert (args.eval_steps, args.save_steps) == (4, 12)
    with pytest.raises(ConfigError, match="--save_steps 6 and --eval_steps 4: one must be a multiple"):
        resolve_shares(parsed(**best, eval_steps=0.1, save_steps=0.15), 40)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("save_steps", 0, "must be at least 1, or a share of all steps below 1"),
        ("save_steps", -0.1, "must be at least 1, or a share"),
        ("logging_steps", 2.5, "must be a whole number, or a share of all steps below 1"),
        ("eval_steps", "inf", "must be a whole number, or a share"),
        ("eval_steps", -0.1, "must not be negative"),
        ("logging_steps", "nan", "must be at least 1, or a share"),
    ],
)
def test_bad_shares(name, value, words):
    with pytest.raises(ConfigError, match=f"--{name} is .*{words}") as error:
        parsed(**{name: value})
    assert "\n" not in str(error.value)
