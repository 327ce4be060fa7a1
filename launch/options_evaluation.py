"""Options of train.py, "evaluation": what is measured and asked on the way, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.command_line import at_least, one_of, option, whole_or_share


@dataclass
class EvaluationOptions:
    """What is measured and asked on the way, and what follows from it."""

    per_device_eval_batch_size: int = option(8, "rows of an evaluation batch")
    eval_strategy: str | None = option(
        None, "when to evaluate: steps or epoch (and at the end), or no; default: steps with --eval_steps, else the end"
    )
    eval_steps: float = option(
        0, "optimizer steps between evaluations, or a share of all below 1; 0: before and after training only"
    )
    eval_on_start: bool = option(True, "evaluate before training, too")
    eval_exact_match: bool = option(False, "ask the evaluation rows, and count the right answers")
    eval_max_samples: int | None = option(None, "rows that are asked, the first ones; default: all")
    sample_prompt: list[str] | None = option(
        None, "instructions whose greedy answers are printed and kept before and after training"
    )
    sample_steps: int = option(0, "optimizer steps between answers to --sample_prompt, or to the first evaluation rows")
    num_samples: int = option(4, "how many evaluation rows, where there is no --sample_prompt")
    max_new_tokens: int = option(128, "length of an answer")
    load_best_model_at_end: bool = option(False, "export the best checkpoint, not the last state")
    metric_for_best_model: str | None = option(None, "loss (default), perplexity or exact_match")
    greater_is_better: bool | None = option(None, "default: for exact_match only")
    early_stopping_patience: int = option(0, "evaluations without improvement that end the run; 0: never")
    early_stopping_threshold: float = option(0.0, "what counts as an improvement has to be larger")


STRATEGIES = ("steps", "epoch", "no")
METRICS = {"loss": "eval_loss", "perplexity": "perplexity", "exact_match": "eval_exact_match"}  # → its name in a row


def check(args: Any) -> None:
    """Raises ConfigError for values out of range, or that contradict each other."""
    at_least(args, 1, "per_device_eval_batch_size", "max_new_tokens", "num_samples", "eval_max_samples")
    at_least(args, 0, "eval_steps", "sample_steps", "early_stopping_patience", "early_stopping_threshold")
    whole_or_share(args, "eval_steps")
    if args.eval_strategy is not None:
        one_of(args, "eval_strategy", STRATEGIES)
    if args.eval_strategy == "steps" and not args.eval_steps:
        raise ConfigError("--eval_strategy is steps and --eval_steps 0: must be at least 1; give --eval_steps")
    if args.eval_strategy == "no" and args.eval_exact_match:
        raise ConfigError("--eval_exact_match with --eval_strategy no: nothing is evaluated; leave one of them out")
    if args.sample_prompt is not None and not all(text.strip() for text in args.sample_prompt):
        raise ConfigError("--sample_prompt is empty; give an instruction, or leave it out")
    metric = metric_name(args)
    if metric == "exact_match" and not args.eval_exact_match:
        raise ConfigError(f"--metric_for_best_model is {metric}: it is not measured; give --eval_exact_match, too")
    if args.eval_max_samples is not None and not args.eval_exact_match:
        raise ConfigError(
            f"--eval_max_samples is {args.eval_max_samples}: bounds the rows that --eval_exact_match asks, which is "
            f"not given; for a smaller evaluation set give --eval_split 'train[:100]'"
        )
    if needs_best(args):
        _check_best(args)


def metric_name(args: Any) -> str:
    """One of METRICS; `eval_loss` is `loss`, as in the Trainer."""
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if name not in METRICS:
        raise ConfigError(
            f"--metric_for_best_model is {args.metric_for_best_model}: must be one of {', '.join(METRICS)}"
        )
    return name


def is_greater_better(args: Any) -> bool:
    return metric_name(args) == "exact_match" if args.greater_is_better is None else args.greater_is_better


def strategy(args: Any) -> str:
    """steps, epoch, no, or end: only before and after training."""
    return args.eval_strategy or ("steps" if args.eval_steps else "end")


def needs_best(args: Any) -> bool:
    """Whether anything depends on which evaluation is the best."""
    return bool(args.load_best_model_at_end or args.early_stopping_patience or args.save_strategy == "best")


def _check_best(args: Any) -> None:
    what = "--save_strategy best"
    if args.load_best_model_at_end or args.early_stopping_patience:
        what = "--load_best_model_at_end" if args.load_best_model_at_end else "--early_stopping_patience"
    when = strategy(args)
    if when not in ("steps", "epoch"):
        raise ConfigError(f"{what} compares evaluations: must have some; give --eval_steps, or --eval_strategy epoch")
    if not args.load_best_model_at_end:
        return
    if args.checkpoint_kind != "full":
        raise ConfigError(
            f"--load_best_model_at_end with --checkpoint_kind {args.checkpoint_kind}: must be full, a small one cannot "
            f"be loaded over a trained model; leave it out"
        )
    if args.save_strategy == "best":
        return
    if args.save_strategy != when:
        raise ConfigError(
            f"--load_best_model_at_end with --save_strategy {args.save_strategy} and --eval_strategy {when}: must be "
            f"the same, so that what is evaluated is saved; make them so, or give --save_strategy best"
        )
    shares = min(args.save_steps, args.eval_steps) < 1  # `resolve_shares` knows how many steps they are, and asks again
    if when == "steps" and not shares and args.save_steps % args.eval_steps and args.eval_steps % args.save_steps:
        raise ConfigError(
            f"--load_best_model_at_end with --save_steps {args.save_steps} and --eval_steps {args.eval_steps}: one "
            f"must be a multiple of the other; change one, or give --save_strategy best"
        )
