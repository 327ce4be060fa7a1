"""Options of train.py, "training": how a step is made: batches, learning rate, what the model computes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.command_line import at_least, at_most, json_object, one_of, option, whole_or_share

# transformers' names, of those that are a function of the step alone
SCHEDULES: tuple[str, ...] = (
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_min_lr",
    "warmup_stable_decay",
)
SCHEDULES += ("inverse_sqrt", "polynomial")


@dataclass
class TrainingOptions:
    """How a step is made: batches, learning rate, what the model computes with."""

    per_device_train_batch_size: int = option(1, "rows of a micro-batch")
    gradient_accumulation_steps: int = option(1, "micro-batches of a rank in an optimizer step")
    learning_rate: float = option(2e-5, "peak learning rate")
    lr_scheduler_type: str = option("cosine", f"schedule of the learning rate: {', '.join(SCHEDULES)}")
    lr_scheduler_kwargs: str | None = option(None, "JSON with more of the schedule, such as '{\"min_lr_rate\": 0.1}'")
    warmup_ratio: float = option(0.03, "share of all steps, rounded down, that warm up")
    warmup_steps: float | None = option(
        None, "warm-up steps, or a share of all below 1 (rounded up, as in transformers 5); wins over --warmup_ratio"
    )
    num_train_epochs: float = option(1.0, "epochs")
    max_steps: int = option(-1, "optimizer steps; when positive it wins over --num_train_epochs")
    adam_beta1: float = option(0.9, "Adam's β₁, where the JSON does not give betas")
    adam_beta2: float = option(0.999, "Adam's β₂, likewise")
    adam_epsilon: float = option(1e-8, "Adam's ε, likewise")
    max_grad_norm: float = option(0.0, "clips the L2 norm over all slices' factor gradients; 0 is off, as published")
    seed: int = option(42, "seed of the data order")
    bf16: bool = option(False, "compute in bf16 where the JSON says auto; else fp32")
    gradient_checkpointing: bool = option(False, "recompute activations in backward (non-reentrant)")
    activation_offloading: bool = option(
        False,
        "keep what backward needs in host memory; best with --gradient_checkpointing",
        aliases=["--activation_offload"],
    )
    neftune_noise_alpha: float | None = option(None, "NEFTune: noise on the embeddings while training; 5 is usual")
    use_liger_kernel: bool = option(False, "Liger's kernels for norms, rotary embedding, MLP and loss, where installed")
    torch_compile: bool = option(False, "refused, with the reason: ZeRO-3 leaves nothing to compile")
    attn_implementation: str | None = option(None, "eager, sdpa, flash_attention_2, …")
    callbacks: list[str] | None = option(
        None, "TrainerCallbacks of transformers: package.module:Class or path/to/file.py:Class, one or more"
    )
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")


def check(args: TrainingOptions) -> None:
    """Raises ConfigError for values out of range."""
    one_of(args, "lr_scheduler_type", SCHEDULES)
    _check_schedule_kwargs(args)
    at_least(args, 1, "per_device_train_batch_size", "gradient_accumulation_steps")
    at_least(args, 0, "learning_rate", "warmup_steps", "max_grad_norm", "seed")
    at_most(args, 2**31, "seed", why="as numpy's generator wants it with a rank's number added")
    whole_or_share(args, "warmup_steps")
    if not 0 <= args.warmup_ratio <= 1:
        raise ConfigError(
            f"--warmup_ratio is {args.warmup_ratio}: must be from 0 to 1; use --warmup_steps for a number"
        )
    if args.neftune_noise_alpha is not None and not 0 < args.neftune_noise_alpha < float("inf"):
        raise ConfigError(
            f"--neftune_noise_alpha is {args.neftune_noise_alpha}: must be greater than 0; leave it out for no noise"
        )
    if args.max_steps == 0 or (args.max_steps < 0 and not 0 < args.num_train_epochs < float("inf")):
        raise ConfigError(
            f"--max_steps is {args.max_steps} and --num_train_epochs {args.num_train_epochs}: nothing to train; "
            "make one of them positive"
        )


def _check_schedule_kwargs(args: TrainingOptions) -> None:
    """What can be said without transformers; the rest is `train_schedule.check_schedule`'s business."""
    schedule_kwargs(args)
    if args.lr_scheduler_kwargs is not None and args.lr_scheduler_type in ("constant", "constant_with_warmup"):
        raise ConfigError(
            f"--lr_scheduler_kwargs {args.lr_scheduler_kwargs}: {args.lr_scheduler_type} takes none; leave it out"
        )


def schedule_kwargs(args: TrainingOptions) -> dict[str, Any]:
    """--lr_scheduler_kwargs as a dict."""
    return json_object(args, "lr_scheduler_kwargs")
