"""Options of train.py, "training": how a step is made: batches, learning rate, what the model computes with."""

from __future__ import annotations

from dataclasses import dataclass

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.command_line import at_least, at_most, one_of, option


@dataclass
class TrainingOptions:
    """How a step is made: batches, learning rate, what the model computes with."""

    per_device_train_batch_size: int = option(1, "rows of a micro-batch")
    gradient_accumulation_steps: int = option(1, "micro-batches of a rank in an optimizer step")
    learning_rate: float = option(2e-5, "peak learning rate")
    lr_scheduler_type: str = option("cosine", "cosine, linear, constant or constant_with_warmup")
    warmup_ratio: float = option(0.03, "share of all steps, rounded down, that warm up")
    warmup_steps: int | None = option(None, "warm-up steps; wins over --warmup_ratio")
    num_train_epochs: float = option(1.0, "epochs")
    max_steps: int = option(-1, "optimizer steps; when positive it wins over --num_train_epochs")
    max_grad_norm: float = option(0.0, "clips the L2 norm over all slices' factor gradients; 0 is off, as published")
    seed: int = option(42, "seed of the data order")
    bf16: bool = option(False, "compute in bf16 where the JSON says auto; else fp32")
    gradient_checkpointing: bool = option(False, "recompute activations in backward (non-reentrant)")
    attn_implementation: str | None = option(None, "eager, sdpa, flash_attention_2, …")
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")


SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


def check(args: TrainingOptions) -> None:
    """Raises ConfigError for values out of range."""
    one_of(args, "lr_scheduler_type", SCHEDULES)
    at_least(args, 1, "per_device_train_batch_size", "gradient_accumulation_steps")
    at_least(args, 0, "learning_rate", "warmup_steps", "max_grad_norm", "seed")
    at_most(args, 2**31, "seed", why="as numpy's generator wants it with a rank's number added")
    if not 0 <= args.warmup_ratio <= 1:
        raise ConfigError(
            f"--warmup_ratio is {args.warmup_ratio}: must be from 0 to 1; use --warmup_steps for a number"
        )
    if args.max_steps == 0 or (args.max_steps < 0 and not 0 < args.num_train_epochs < float("inf")):
        raise ConfigError(
            f"--max_steps is {args.max_steps} and --num_train_epochs {args.num_train_epochs}: nothing to train; "
            "make one of them positive"
        )
