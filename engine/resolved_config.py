"""A config, resolved once: read, checked against ranks and device, filled, and frozen.

Nothing here reads weights or communicates, so that a mistake is reported before either.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hdpissa.kernels.available import FUSED_MAX_R, obstacle

from .config import ds_config
from .config.section import HDPissaConfig
from .errors import ConfigError
from .sharding import zero3
from .sharding.slicing import SlicePlan

REDUCED_AT_ONCE = 50_000_000  # gradient elements; no buffer is kept for them


@dataclass(frozen=True)
class ResolvedConfig:
    """What a run is made from; nothing in it changes.

    Attributes:
        deepspeed: DeepSpeed's own config, complete. section: `hd_pissa`. plan: slices and ranks.
        values: what config and caller agree on: batch, accumulation, clipping, learning rate.
        unused: keys of the file that have no effect.
    """

    deepspeed: dict[str, Any]
    section: HDPissaConfig
    values: ds_config.TrainValues
    plan: SlicePlan
    unused: tuple[str, ...] = ()

    def same_run(self, other: ResolvedConfig) -> bool:
        """Whether both describe one run; the learning rate is a scheduler's business, and may differ."""
        return self.section == other.section and _without_lr(self.deepspeed) == _without_lr(other.deepspeed)


def resolve_config(config: str | Path | dict, *, lr: float | None = None) -> ResolvedConfig:
    """Reads a config, checks it, and fills "auto" with `initialize`'s defaults; for bf16 that is: on a GPU.

    Raises:
        ConfigError: what a user can get wrong, in one line.
    """
    raw, hd = ds_config.split_section(ds_config.read_ds_config(config))
    ds_config.check_ds_config(raw)
    defaults = ds_config.TrainValues(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        world_size=zero3.read_launcher()[1],
        max_grad_norm=0.0,
        learning_rate=2e-5 if lr is None else lr,
        bf16=zero3.device().type != "cpu",
        given=frozenset() if lr is None else frozenset({"learning_rate"}),
    )
    filled, values = ds_config.fill_auto(raw, defaults)
    final = ds_config.engine_ds_config(filled)
    if hd.modules_to_save:
        final = _with_full_training(final, hd)
    zero3.check_zero_section(final["zero_optimization"])
    plan = make_plan(hd, values.gradient_accumulation_steps)
    check_kernels(hd)
    unused = ("zero_optimization.offload_optimizer",) if "offload_optimizer" in raw["zero_optimization"] else ()
    return ResolvedConfig(final, hd, values, plan, unused)


def _without_lr(config: dict[str, Any]) -> dict[str, Any]:
    optimizer = {**config["optimizer"], "params": {**config["optimizer"]["params"], "lr": None}}
    return {**config, "optimizer": optimizer}


def _with_full_training(final: dict, hd: HDPissaConfig) -> dict:
    """The config with which DeepSpeed trains `modules_to_save`, and not only its anchor."""
    out = copy.deepcopy(final)
    out["optimizer"]["params"] |= {"betas": list(hd.adam.betas), "eps": hd.adam.eps}
    # micro-batches are added up in fp32; a sum in bf16 loses the small ones
    out.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    out["zero_optimization"]["reduce_bucket_size"] = REDUCED_AT_ONCE
    return out


def make_plan(hd: HDPissaConfig, accumulation: int) -> SlicePlan:
    """The slice plan of this rank; raises ConfigError for counts that do not divide."""
    rank, world, _ = zero3.read_launcher()
    plan = SlicePlan(world if hd.slices == "auto" else hd.slices, world, rank)
    plan.micro_batches_per_slice(accumulation)
    return plan


def check_kernels(hd: HDPissaConfig) -> None:
    """Refuses kernels that this machine cannot run.

    Raises:
        ConfigError: the config names them, and they cannot run here.
    """
    impl, device = hd.kernels.impl, zero3.device()
    if hd.delta.precision == "tf32" and (device.type != "cuda" or impl == "torch"):
        why = "hd_pissa.kernels.impl is torch" if device.type == "cuda" else f"this runs on {device.type}"
        raise ConfigError(f'hd_pissa.delta.precision is "tf32": needs Triton on a GPU and {why}; set it to "fp32"')
    fused = hd.kernels.linear == "fused"
    if fused and impl == "torch":
        raise ConfigError(
            'hd_pissa.kernels.linear is "fused" and impl "torch": fused is a Triton kernel; set one to "auto"'
        )
    widest = max(hd.r, *hd.rank_pattern.values()) if hd.rank_pattern else hd.r
    if fused and widest > FUSED_MAX_R:
        raise ConfigError(
            f'hd_pissa.kernels.linear is "fused" and r is {widest}: must be at most {FUSED_MAX_R}; set it to "auto"'
        )
    if not (fused or impl == "triton"):
        return
    # on the rank's own GPU, which the launcher's checks have not selected yet: a tensor makes a context there
    own = torch.device("cuda", zero3.read_launcher()[2]) if device.type == "cuda" else device
    problem = obstacle(torch.empty(0, device=own))
    if problem:
        key, value = ("impl", "triton") if impl == "triton" else ("linear", "fused")
        raise ConfigError(f'hd_pissa.kernels.{key} is "{value}": {problem}; or set it to "auto"')
