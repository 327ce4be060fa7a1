"""Options of train.py, "run": what is run, and when it ends early."""

from __future__ import annotations

from dataclasses import dataclass

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.command_line import at_least, check_paths, option

LONGEST_TIMEOUT_S = 10**7  # four months


@dataclass
class RunningOptions:
    """What is run, and when it ends early."""

    ds_config: str = option(
        "",
        "DeepSpeed JSON with the section hd_pissa, or the name of one of ds_configs/: zero3, zero3_one_gpu, …",
        aliases=["--deepspeed", "--deepspeed_config"],
    )
    model_name_or_path: str = option("", "Hugging Face folder or hub name")
    output_dir: str = option("", "folder for metrics, run state and the trained model")
    ddp_timeout: int = option(1800, "seconds that ranks wait for each other; then the run has lost one, and ends")
    hang_timeout: int | None = option(
        None,
        "seconds within which a run that stands still ends and names who hangs; default 600, or --ddp_timeout if less",
    )
    max_skipped_steps: int = option(10, "skipped steps in a row that end the run (not finite); 0: never")
    integrity_steps: int = option(
        0, "optimizer steps between two checks that what must not differ, or change, does not; 0: none"
    )
    local_rank: int = option(-1, "set by the deepspeed launcher; the environment is what counts")

    @property
    def hang_s(self) -> int:
        """Seconds within which a run that stands still ends."""
        return min(self.ddp_timeout, 600) if self.hang_timeout is None else self.hang_timeout


def check(args: RunningOptions) -> None:
    """Raises ConfigError for values out of range."""
    check_paths(args, "model_name_or_path", "output_dir")
    at_least(args, 1, "ddp_timeout")
    at_least(args, 0, "max_skipped_steps", "integrity_steps")
    if not 1 <= args.hang_s <= args.ddp_timeout:
        raise ConfigError(
            f"--hang_timeout is {args.hang_s} and --ddp_timeout {args.ddp_timeout}: must be from 1 to --ddp_timeout, "
            f"after which a collective ends the run anyway"
        )


def shorten_timeout(args: RunningOptions) -> list[str]:
    """Takes a longer --ddp_timeout (LLaMA-Factory's examples say 180000000) for the longest; what to say of it."""
    if args.ddp_timeout <= LONGEST_TIMEOUT_S:
        return []
    told = f"--ddp_timeout is {args.ddp_timeout}: taken for {LONGEST_TIMEOUT_S}, four months"
    args.ddp_timeout = LONGEST_TIMEOUT_S
    return [told]
