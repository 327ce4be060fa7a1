"""The ready trainers: TRL's and transformers' own, with `HDPissaMixin` before them."""

from __future__ import annotations

import hashlib
import logging
import re
from typing import Any, ClassVar

import torch
from transformers import Trainer, TrainingArguments
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer

from hdpissa.engine import consensus
from hdpissa.engine.distributed import heartbeat
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.sharding import zero3

from .arguments import option
from .mixin import HDPissaMixin

logger = logging.getLogger(__name__)


class HDPissaTrainer(HDPissaMixin, Trainer):
    """`transformers.Trainer` with HD-PiSSA."""


class HDPissaSFTTrainer(HDPissaMixin, SFTTrainer):
    """`trl.SFTTrainer` with HD-PiSSA."""

    def _check(self, args: TrainingArguments) -> None:
        if option(args, "cross_entropy") == "chunked":
            _refuse_head(self.run_config.section.target_modules, 'set cross_entropy to "model", or leave it out')

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's chunked head, or with `cross_entropy="model"` the model's own loss over all logits, as Trainer's."""
        if option(self.args, "cross_entropy") == "chunked":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._count_tokens(inputs)
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


class _OwnReference:
    """For trainers that keep the log-probabilities of a reference on disk."""

    @property
    def _precompute_model_hash(self) -> str | None:
        """Under which they are kept; TRL hashes the state dict, which ZeRO-3 leaves empty, as if all were one model."""
        known = self.__dict__["_precompute_model_hash"]
        model = getattr(self, "ref_model", None) or self.model  # type: ignore[attr-defined]
        if known is None or not zero3.is_sharded(model):
            return known
        own = hashlib.sha256()
        for name, param in model.named_parameters():
            own.update(name.encode())
            own.update(zero3.shard_view(param).detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return hashlib.sha256(" ".join(consensus.gather(own.hexdigest())).encode()).hexdigest()

    @_precompute_model_hash.setter
    def _precompute_model_hash(self, found: str | None) -> None:
        self.__dict__["_precompute_model_hash"] = found


class HDPissaDPOTrainer(_OwnReference, HDPissaMixin, DPOTrainer):
    """`trl.DPOTrainer` with HD-PiSSA."""

    def _check(self, args: TrainingArguments) -> None:
        _refuse_head(self.run_config.section.target_modules, "leave it out")


class HDPissaGRPOTrainer(HDPissaMixin, GRPOTrainer):  # type: ignore[misc]  # the mixin passes the sampler through
    """`trl.GRPOTrainer` with HD-PiSSA. Its sampler repeats prompts, so what a slice sees depends on the ranks."""

    slice_order = False

    def _check(self, args: TrainingArguments) -> None:
        _refuse_head(self.run_config.section.target_modules, "leave it out")

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Here TRL generates, rewards and asks the reference, which takes longer than any forward pass."""
        heartbeat.beat("generate", slow=True)
        inputs = super()._prepare_inputs(*args, **kwargs)
        heartbeat.beat("step.forward")
        return inputs

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """TRL counts its forward passes from 0, and keeps no completions that it has generated for several steps."""
        found = super()._prepare_for_training(*args, **kwargs)
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        per_generation = self.args.steps_per_generation  # type: ignore[attr-defined]  # GRPOConfig's
        if self._step % (per_generation * self.num_iterations) and self.is_world_process_zero():
            logger.warning(
                "step %d lies between two generations: their completions are generated anew, by the model of now",
                self.state.global_step,
            )
        return found


class HDPissaKTOTrainer(_OwnReference, HDPissaMixin, KTOTrainer):
    """`trl.KTOTrainer` with HD-PiSSA. Its KL is a mean over what all ranks compute at a time."""

    def _check(self, args: TrainingArguments) -> None:
        _refuse_head(self.run_config.section.target_modules, "leave it out")


class HDPissaRewardTrainer(HDPissaMixin, RewardTrainer):
    """`trl.RewardTrainer` with HD-PiSSA. The head is new: DeepSpeed's AdamW trains it whole, beside the slices."""

    section_defaults: ClassVar[dict[str, Any]] = {"modules_to_save": ["score"]}
    new_modules = ("score",)


def _refuse_head(targets: list[str] | str, remedy: str) -> None:
    """TRL's head reads `lm_head.weight` itself: as a target it would get no gradient."""
    named = re.fullmatch(targets, "lm_head") if isinstance(targets, str) else "lm_head" in targets
    if named:
        raise ConfigError(
            f'hd_pissa.target_modules has "lm_head", whose weight TRL\'s chunked head reads itself: {remedy}'
        )
