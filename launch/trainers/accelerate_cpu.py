"""The one patch of a foreign object: DeepSpeed's process group for accelerate.

accelerate 1.13 to 1.15 knows no DeepSpeed on several CPU ranks: `PartialState._prepare_backend` finds no backend there,
and every rank silently believes that it is the only one. Nor does it start without a launcher's environment (a plain
`python train.py`), or under `srun`. While TrainingArguments with `deepspeed=` set up their devices, this project's own
door to DeepSpeed therefore prepares the environment and names the backend; accelerate then starts the group as it does
on GPUs.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

from hdpissa.engine.errors import ConfigError

DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"  # set by TrainingArguments for just that moment, and by `accelerate launch`


def install() -> None:
    """Patches accelerate, once per process.

    Raises:
        ImportError: its method is not what it was.
    """
    from accelerate.state import PartialState

    original = PartialState._prepare_backend
    if getattr(original, "hdpissa", False):
        return
    expected = ["self", "cpu", "sagemaker_dp", "backend"]
    if list(inspect.signature(original).parameters) != expected:
        raise ImportError("accelerate.PartialState._prepare_backend has changed: use accelerate >=1.13,<1.16")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL counts its trainers; who wants that sets 0

    def prepare_backend(self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None) -> Any:
        if cpu or sagemaker_dp or os.environ.get(DEEPSPEED, "").lower() != "true":
            return original(self, cpu, sagemaker_dp, backend)
        from hdpissa.engine.sharding import zero3

        zero3.prepare_environment()
        found, kind = original(self, cpu, sagemaker_dp, backend)
        return found or "gloo", kind  # what it calls "no distribution" becomes DeepSpeed's in a moment

    prepare_backend.hdpissa = True  # type: ignore[attr-defined]
    PartialState._prepare_backend = prepare_backend


def check_world_size(world_size: int) -> None:
    """Raises ConfigError unless the trainer sees as many ranks as the launcher started."""
    from hdpissa.engine.distributed.launcher import read_launch

    launched = read_launch(os.environ).world_size
    if world_size != launched:
        raise ConfigError(
            f"the trainer sees {world_size} processes, the launcher started {launched}: import "
            f"hdpissa.launch.trainers before TrainingArguments are made, and do not set use_cpu"
        )
