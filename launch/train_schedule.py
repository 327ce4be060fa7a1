"""The learning rate's schedule: transformers' own, and what of --lr_scheduler_kwargs can be wrong."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

from hdpissa.engine.errors import ConfigError
from hdpissa.launch import options_evaluation
from hdpissa.launch.options_training import schedule_kwargs

OURS = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")  # that a person does not give
MOST_TRIED = 1000  # steps at which a schedule is looked at before it is used


def warmup_steps(args: Any, total_steps: int) -> int:
    """Steps that warm up. Each kind of share is rounded as where it comes from: down by the published code, up by
    transformers 5, which has no --warmup_ratio any more."""
    if args.warmup_steps is None:
        return int(args.warmup_ratio * total_steps)
    return math.ceil(args.warmup_steps * total_steps) if args.warmup_steps < 1 else int(args.warmup_steps)


def resolve_shares(args: Any, total_steps: int) -> None:
    """Makes numbers of steps of what was given as a share of all, rounded up as in transformers.

    Raises:
        ConfigError: numbers that do not fit each other.
    """
    for name in ("logging_steps", "eval_steps", "save_steps"):
        if getattr(args, name) < 1:  # --eval_steps 0 stays 0
            setattr(args, name, math.ceil(getattr(args, name) * total_steps))
    options_evaluation.check(args)


def make_scheduler(args: Any, optimizer: Any, total_steps: int, start: int = 0) -> Any:
    """transformers' schedule, `start` steps done; step t (from 0) has the learning rate that method.md gives."""
    for group in optimizer.param_groups:
        group["lr"] = group.get("peak_lr", optimizer.defaults["lr"])  # a checkpoint's is a later step's
    scheduler = _build(args, optimizer, total_steps)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that the optimizer has not stepped yet
        for _ in range(start):
            scheduler.step()
    return scheduler


def _build(args: Any, optimizer: Any, total_steps: int) -> Any:
    from transformers import get_scheduler

    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=warmup_steps(args, total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=schedule_kwargs(args),
    )


def check_schedule(args: Any, lr: float, total_steps: int, given: frozenset[str] = frozenset()) -> None:
    """Makes the schedule once, for an optimizer of nothing, and looks at it.

    Args:
        given: options that the user has set; --warmup_ratio has a default, which nobody asks `constant` for.

    Raises:
        ConfigError: keys that it does not have, or needs; values with which it gives no learning rate; a warm-up that
            it would leave out in silence.
    """
    import torch

    kwargs = schedule_kwargs(args)
    _check_warmup(args, given)
    _check_keys(args.lr_scheduler_type, kwargs)
    if args.lr_scheduler_type == "warmup_stable_decay":
        _check_phases(args, kwargs, total_steps)
    told = f"--lr_scheduler_type {args.lr_scheduler_type} with --lr_scheduler_kwargs {args.lr_scheduler_kwargs or '{}'}"
    try:
        with warnings.catch_warnings(action="ignore"):
            scheduler = _build(args, torch.optim.SGD([torch.zeros(1)], lr=lr), total_steps)
        [factor] = getattr(scheduler, "lr_lambdas", [lambda step: 1.0])
        tried = sorted({step * total_steps // MOST_TRIED for step in range(MOST_TRIED)})
        found = {step: factor(step) for step in tried}
    except (TypeError, ValueError, ArithmeticError, KeyError) as error:
        raise ConfigError(f"{told}: {' '.join(str(error).split())}; correct it") from None
    for step, value in found.items():
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ConfigError(f"{told}: gives {value} times the learning rate in step {step + 1}; correct it")


def _check_warmup(args: Any, given: frozenset[str]) -> None:
    name = "warmup_ratio" if args.warmup_steps is None else "warmup_steps"
    wanted = getattr(args, name)
    if args.lr_scheduler_type == "constant" and wanted and (name in given or args.warmup_steps is not None):
        raise ConfigError(
            f"--{name} {wanted}: constant has no warm-up; give --lr_scheduler_type constant_with_warmup, or leave it "
            f"out"
        )


def describe_warmup(args: Any, total_steps: int) -> str | None:
    """A warm-up that the run is too short for, in words. It is no mistake: a config may be tried for a few steps."""
    steps = 0 if args.lr_scheduler_type == "constant" else warmup_steps(args, total_steps)
    if steps < total_steps:
        return None
    return (
        f"the warm-up has {steps} steps and the run {total_steps}: the learning rate never reaches its peak, it ends "
        f"at {(total_steps - 1) / steps:.1%} of it"
    )


def _check_keys(name: str, given: dict[str, Any]) -> None:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    function: Callable[..., Any] = TYPE_TO_SCHEDULER_FUNCTION[name]
    keys = {k: p for k, p in inspect.signature(function).parameters.items() if k not in OURS}
    unknown = [key for key in given if key not in keys]
    missing = [key for key, p in keys.items() if p.default is p.empty and key not in given]
    for problem, names in (("has no", unknown), ("needs", missing)):
        if names:
            what = f"its keys: {', '.join(keys)}" if keys else "it takes none"
            raise ConfigError(f"--lr_scheduler_kwargs: {name} {problem} {', '.join(names)}; {what}")


def _check_phases(args: Any, given: dict[str, Any], total_steps: int) -> None:
    """The three phases have to fit into the run, or the decay would begin in its middle."""
    phases = [warmup_steps(args, total_steps), given["num_decay_steps"], given.get("num_stable_steps") or 0]
    if not all(isinstance(n, int) and n >= 0 for n in phases):
        raise ConfigError(
            f"--lr_scheduler_kwargs {args.lr_scheduler_kwargs}: numbers of steps must be integers of at least 0; "
            f"correct them"
        )
    if sum(phases) > total_steps:
        raise ConfigError(
            f"--lr_scheduler_kwargs {args.lr_scheduler_kwargs}: warm-up, stable and decay steps are {sum(phases)} "
            f"together, more than the run's {total_steps}; make num_decay_steps smaller"
        )
