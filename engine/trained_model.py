"""The trained model, exported or generating: methods of `HDPissaEngine`, each of them a function of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .distributed import heartbeat
from .errors import ConfigError
from .export.from_engine import export_hf, export_peft
from .export.lora_adapter import refuse_modules_to_save
from .export.report import ExportReport

if TYPE_CHECKING:
    from .engine import HDPissaEngine


def export(
    engine: HDPissaEngine, folder: str | Path, *, format: str = "hf", dtype: str = "auto", rank: int | None = None
) -> ExportReport:
    """Writes the trained model and verifies what was written; collective.

    Args:
        format: "hf", a Hugging Face folder, or "peft", a LoRA adapter for the unmodified base.
        dtype: "bf16", "fp32" (targets exact), or "auto": the compute dtype, fp32 for an adapter.
        rank: cuts an adapter to at most this rank; None keeps all of it, 2·r·S.

    Raises:
        ConfigError: format, rank or folder cannot be used.
        RuntimeError: W holds results that were not finite, see `HDPissaEngine.check_weights`.
    """
    if format not in ("hf", "peft"):
        raise ConfigError(f"export format is {format!r}: must be 'hf' or 'peft'")
    if format == "hf" and rank is not None:
        raise ConfigError(f"export rank is {rank} with format 'hf': only an adapter has a rank; leave it out")
    engine.check_weights()
    optimizer, step = engine.optimizer, engine.global_steps
    if format == "hf":
        return export_hf(engine.module, engine.targets, engine.plan, Path(folder), dtype=dtype, step=step)
    refuse_modules_to_save(optimizer.modules_to_save.params if optimizer.modules_to_save else ())
    store, updates = optimizer.store, optimizer.updates
    return export_peft(engine.module, store, Path(folder), dtype=dtype, rank=rank, step=step, updates=updates)


def generate(engine: HDPissaEngine, *args: Any, **kwargs: Any) -> Tensor:
    """`module.generate`; all ranks must call it together, because each forward gathers weights."""
    kwargs.setdefault("synced_gpus", engine.plan.world_size > 1)  # a rank that has finished keeps gathering
    heartbeat.beat("generate")
    with torch.no_grad():
        return engine.module.generate(*args, **kwargs)  # type: ignore[operator]
