"""Options of train.py, "checkpoints and export": what is kept of the run."""

from __future__ import annotations

from dataclasses import dataclass

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.command_line import above_0, check_paths, one_of, option, whole_or_share


@dataclass
class SavingOptions:
    """What is kept of the run."""

    save_strategy: str = option("steps", "when to save a checkpoint: steps or epoch (and at the end), best, or no")
    save_steps: float = option(500, "optimizer steps between two checkpoints, or a share of all below 1")
    save_total_limit: int | None = option(None, "checkpoints to keep; default: all")
    checkpoint_kind: str = option("full", "full: exact; small: without weights, exact to first order")
    async_save: bool = option(False, "write checkpoints in the background, from copies in host memory")
    stop_on_save_error: bool = option(False, "end the run when a checkpoint cannot be saved; else it goes on")
    resume_from_checkpoint: str | None = option(
        None, "a checkpoint's folder; auto: the latest one of --output_dir, or a new run where there is none"
    )
    ignore_data_skip: bool = option(False, "resume with other data, from their beginning")
    export_format: str = option("hf", "hf: the model in model/; peft: a LoRA adapter in adapter/; both, or none")
    export_dtype: str = option("auto", "dtype of what is exported: auto (compute dtype; adapter: fp32), bf16 or fp32")
    export_rank: int | None = option(None, "cuts the adapter to this rank; all of it is 2·r·S")
    overwrite_output_dir: bool = option(False, "let this run replace the one in --output_dir")


SAVE_STRATEGIES, CHECKPOINT_KINDS = ("steps", "epoch", "best", "no"), ("full", "small")
EXPORT_FORMATS = ("hf", "peft", "both", "none")


def check(args: SavingOptions) -> None:
    """Raises ConfigError for values out of range."""
    check_paths(args, "resume_from_checkpoint")
    one_of(args, "save_strategy", SAVE_STRATEGIES)
    one_of(args, "checkpoint_kind", CHECKPOINT_KINDS)
    above_0(args, "save_steps")
    whole_or_share(args, "save_steps")
    if args.save_total_limit is not None and args.save_total_limit < 1:
        raise ConfigError(
            f"--save_total_limit is {args.save_total_limit}: must be at least 1; leave it out to keep all"
        )
    one_of(args, "export_format", EXPORT_FORMATS)
    one_of(args, "export_dtype", ("auto", "bf16", "fp32"))
    if args.export_rank is not None and (args.export_rank < 1 or args.export_format not in ("peft", "both")):
        raise ConfigError(
            f"--export_rank is {args.export_rank}: must be at least 1, with --export_format peft or both; leave it out "
            f"for the whole adapter"
        )
