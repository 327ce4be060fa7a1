"""Options of train.py, "logging": what is told of the run."""

from __future__ import annotations

from dataclasses import dataclass

from hdpissa.launch.command_line import at_least, option


@dataclass
class ReportingOptions:
    """What is told of the run."""

    logging_steps: int = option(1, "optimizer steps between two lines and metrics rows")


def check(args: ReportingOptions) -> None:
    """Raises ConfigError for values out of range."""
    at_least(args, 1, "logging_steps")
