"""Decides whether DPO holds its reference model, unless the user has: only if it fits beside the trained one.

If not, `precompute_ref_log_probs` computes its log-probabilities before training, when the model to be trained still is
the reference: one forward pass over the rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from hdpissa.engine import consensus
from hdpissa.launch.planning.arguments import PlanArguments, make_run
from hdpissa.launch.planning.hardware import GIB, GPUS, Cluster
from hdpissa.launch.planning.memory import memory
from hdpissa.launch.planning.run import Run
from hdpissa.launch.trainers.arguments import HDPissaDPOConfig
from hdpissa.launch.training.script_arguments import Arguments

LENGTH = 1024  # planned of rows that are not cut


def smallest_gpu() -> int | None:
    """Bytes of the run's GPU with the least memory, the same on every rank; None without GPUs. Collective."""
    if not torch.cuda.is_available():
        return None
    total = torch.cuda.mem_get_info()[1]
    return min(consensus.gather(total)) if dist.is_initialized() else total


def choose(arguments: Arguments, rows: Any, nbytes: int | None) -> str:
    """Sets `precompute_ref_log_probs` where it is needed; returns one line about that, or nothing.

    Args:
        rows: to train on; log-probabilities of a stream cannot be computed beforehand.
        nbytes: of the smallest GPU; None, on CPUs, changes nothing.
    """
    training = arguments.training
    if nbytes is None or not isinstance(training, HDPissaDPOConfig) or not hasattr(rows, "__len__"):
        return ""
    if training.sync_ref_model or "precompute_ref_log_probs" in arguments.given:
        return ""
    run = planned(arguments.script.model_name_or_path, training)
    if run.placement.hpz > 1:
        why = "hpZ allows no second model"
    elif (peak := memory(run).peak) > nbytes:
        why = f"with a reference model a GPU of {nbytes / GIB:.1f} GiB would need {peak / GIB:.1f}"
    else:
        return ""
    training.precompute_ref_log_probs = True
    return f"{why}: its log-probabilities are computed before training (--precompute_ref_log_probs)"


def planned(model: str | None, training: HDPissaDPOConfig) -> Run:
    """The plan's view of a run of DPO that holds its reference."""
    world = training.world_size
    args = PlanArguments(
        model_name_or_path=str(model),
        trainer="dpo",
        gpus=world,
        max_length=training.max_length or LENGTH,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        gradient_checkpointing=bool(training.gradient_checkpointing),
        bf16=bool(training.bf16),
        trust_remote_code=training.trust_remote_code,
    )
    any_gpu = next(iter(GPUS.values()))  # the bytes that a run needs do not depend on it
    assert isinstance(training.deepspeed, dict)  # the script has read it
    return make_run(args, training.deepspeed, {}, frozenset(), Cluster(any_gpu, world, world))
