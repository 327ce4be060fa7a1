"""Arguments of our trainers beside TrainingArguments', and argument classes that have both.

The trainers take stock `TrainingArguments`, `SFTConfig`, … too: what they lack has the defaults here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig


@dataclass
class HDPissaArguments:
    """What a run can say beside the section `hd_pissa` and TrainingArguments."""

    checkpoint_kind: Literal["full", "small"] = field(
        default="full", metadata={"help": "full: exact; small: without weights, which follow from the running sums."}
    )
    async_save: bool = field(default=False, metadata={"help": "Write checkpoints in the background."})
    stop_on_save_error: bool = field(
        default=False,
        metadata={"help": "End the run when a checkpoint cannot be saved; otherwise warn and continue."},
    )
    loss_normalization: Literal["tokens", "mean"] = field(
        default="tokens",
        metadata={"help": "tokens: mean over all target tokens of the step, as in Trainer; mean: of micro-batches."},
    )
    cross_entropy: Literal["chunked", "model"] = field(
        default="chunked",
        metadata={"help": "SFT: chunked, TRL's head that never holds all logits; model, the model's own loss."},
    )
    warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of all steps, rounded down, that warm up; warmup_steps wins over it."}
    )
    hang_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds a run may stand still before it ends; default 600, or ddp_timeout if less; 0: never."
        },
    )
    max_skipped_steps: int = field(
        default=10, metadata={"help": "Non-finite steps in a row that end the run; 0: any number."}
    )
    integrity_steps: int = field(
        default=0, metadata={"help": "Steps between two checks for silent corruption; 0: never."}
    )
    slice_metrics_steps: int = field(
        default=0, metadata={"help": "Steps between two rows of gradient and update norms per slice; 0: never."}
    )
    silent_slice_steps: int = field(
        default=10, metadata={"help": "Warn of a slice without gradient or update for so many steps."}
    )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """`warmup_steps` as transformers has it, which rounds a share up; else of `warmup_ratio`, as published."""
        if self.warmup_steps:  # type: ignore[attr-defined]
            return super().get_warmup_steps(num_training_steps)  # type: ignore[misc]
        return int(self.warmup_ratio * num_training_steps)

    def _validate_args(self) -> None:
        """TrainingArguments refuse bf16 where there is no GPU; here it is computed on CPUs, too."""
        if torch.cuda.is_available():
            super()._validate_args()  # type: ignore[misc]
            return
        stock: Any = self  # the fields are those of the TrainingArguments that this class is mixed into
        wanted = stock.bf16, stock.bf16_full_eval
        stock.bf16 = stock.bf16_full_eval = False
        try:
            super()._validate_args()  # type: ignore[misc]
        finally:
            stock.bf16, stock.bf16_full_eval = wanted


DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(HDPissaArguments)}


def option(args: TrainingArguments, name: str) -> Any:
    """An option of ours, from arguments that may be stock ones."""
    return getattr(args, name, DEFAULTS[name])


@dataclass
class HDPissaTrainingArguments(HDPissaArguments, TrainingArguments):
    """TrainingArguments and ours."""


@dataclass
class HDPissaSFTConfig(HDPissaArguments, SFTConfig):
    """`trl.SFTConfig` and ours."""


@dataclass
class HDPissaDPOConfig(HDPissaArguments, DPOConfig):
    """`trl.DPOConfig` and ours."""


@dataclass
class HDPissaGRPOConfig(HDPissaArguments, GRPOConfig):
    """`trl.GRPOConfig` and ours."""


@dataclass
class HDPissaKTOConfig(HDPissaArguments, KTOConfig):
    """`trl.KTOConfig` and ours."""


@dataclass
class HDPissaRewardConfig(HDPissaArguments, RewardConfig):
    """`trl.RewardConfig` and ours."""
