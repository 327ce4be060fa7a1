"""Options of train.py, "evaluation": what is measured and asked on the way."""

from __future__ import annotations

from dataclasses import dataclass

from hdpissa.launch.command_line import at_least, option


@dataclass
class EvaluationOptions:
    """What is measured and asked on the way."""

    per_device_eval_batch_size: int = option(8, "rows of an evaluation batch")
    eval_steps: int = option(0, "optimizer steps between evaluations; 0: before and after training only")
    sample_prompt: str | None = option(None, "an instruction whose greedy answer is printed before and after training")
    max_new_tokens: int = option(128, "length of that answer")


def check(args: EvaluationOptions) -> None:
    """Raises ConfigError for values out of range."""
    at_least(args, 1, "per_device_eval_batch_size", "max_new_tokens")
    at_least(args, 0, "eval_steps")
