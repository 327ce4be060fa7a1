"""What of a command line counts for nothing in this run and yet is no mistake; each is a line at its start.

A config may be shared by runs of which one does not evaluate, or is tried for a few steps only: there a refusal would
ask for a second file. What is a mistake in any run is refused where its option is checked.
"""

from __future__ import annotations

from typing import Any

from hdpissa.launch.options_evaluation import strategy
from hdpissa.launch.train_schedule import describe_warmup


def notes(args: Any, given: frozenset[str], rows: Any, total_steps: int) -> list[str]:
    """The lines, without "note: ".

    Args:
        given: options that the user has set. rows: of the run.
    """
    found = [describe_warmup(args, total_steps)]
    asked = args.sample_steps and args.sample_prompt is None
    if args.eval_strategy == "no" and rows.held_out is not None and not asked:
        found.append("--eval_strategy no: the evaluation rows are read, and nothing is evaluated on them")
    if "eval_steps" in given and args.eval_steps and strategy(args) != "steps":
        found.append(f"--eval_steps {args.eval_steps} counts for nothing with --eval_strategy {args.eval_strategy}")
    if "save_steps" in given and args.save_strategy != "steps":
        found.append(f"--save_steps {args.save_steps} counts for nothing with --save_strategy {args.save_strategy}")
    return [note for note in found if note]
