"""Options of train.py, "logging": what is told of the run, and to whom."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.command_line import above_0, at_least, check_paths, option, whole_or_share


@dataclass
class ReportingOptions:
    """What is told of the run, and to whom."""

    logging_steps: float = option(1, "optimizer steps between two lines and metrics rows, or a share of all below 1")
    logging_first_step: bool = option(False, "log the first step, too")
    disable_tqdm: bool = option(False, "plain lines on a terminal, too, in place of the bar")
    report_to: list[str] | None = option(
        None, "who gets the rows of metrics.jsonl, too: tensorboard and wandb, or all (those installed); default: none"
    )
    run_name: str | None = option(None, "name of the W&B run; default: WANDB_NAME, or the output folder's name")
    logging_dir: str | None = option(None, "folder of TensorBoard's file; default: runs/… in --output_dir")
    slice_metrics_steps: int = option(0, "optimizer steps between two rows of figures per slice; 0: none")
    silent_slice_steps: int = option(
        10, "warn of a slice whose gradient or update was 0 for so many steps (with --slice_metrics_steps)"
    )


REPORTERS = ("tensorboard", "wandb")


def check(args: ReportingOptions) -> None:
    """Raises ConfigError for values out of range."""
    check_paths(args, "logging_dir")
    above_0(args, "logging_steps")
    whole_or_share(args, "logging_steps")
    at_least(args, 1, "silent_slice_steps")
    at_least(args, 0, "slice_metrics_steps")
    reporters(args)


def reporters(args: ReportingOptions) -> list[str]:
    """Those of REPORTERS that --report_to means; raises ConfigError for what is unknown, or not installed."""
    names = [name for text in args.report_to or () for name in text.replace(",", " ").split()]
    for name in names:
        if name not in (*REPORTERS, "all", "none"):
            raise ConfigError(f"--report_to is {name}: must be one of none, all, {', '.join(REPORTERS)}")
        if name in ("all", "none") and len(set(names)) > 1:
            raise ConfigError(f"--report_to is {' '.join(names)}: {name} stands alone; give it, or the others")
        if name in REPORTERS and not _is_installed(name):
            raise ConfigError(f"--report_to {name}: it is not installed; pip install {name}, or leave it out")
    if names[:1] == ["all"]:
        return [name for name in REPORTERS if _is_installed(name)]
    return [name for name in REPORTERS if name in names]


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
