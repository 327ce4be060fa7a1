"""The model of evaluate.py: what can be known of it, and of the device, before any weight is read; then its loading.

Own file because all of it can be wrong in ways that only a person can mend. Heavy imports stay inside the functions.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hdpissa.engine.errors import ConfigError

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def check_device(name: str | None) -> None:
    """Refuses a device that this machine, or this torch, does not have."""
    import torch

    from hdpissa.engine.hub_errors import reason

    if name is None:
        return
    try:
        torch.zeros(1, device=name).tolist()
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without it
        raise ConfigError(
            f"--device {name}: cannot be used here ({reason(error)}); give cpu, or leave it out for what there is"
        ) from None


def read_config(asked: str, name: str, trust_remote_code: bool) -> Any:
    """The configuration of a model, of a folder's whose weights are all there, too; None where only loading will tell.

    Args:
        asked: what --model says. name: where the model, or an adapter's base, is.
    """
    from transformers import AutoConfig

    from hdpissa.launch.model_checks import check_weights
    from hdpissa.launch.train_checks import explained

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a damaged file leads to
        if not Path(name).exists():  # on the hub an adapter has no configuration of a model
            return None
        said, remedy = explained(name, error, "give a run's folder, a model's, or a hub name")
        raise ConfigError(f"--model {asked}: {name} is no usable model ({said}); {remedy}") from None
    check_weights(name, option="--model")
    return config


def read_tokenizer(folder: str, trust_remote_code: bool) -> Any:
    """As train.py reads it; see there."""
    from hdpissa.launch import train_checks

    where = SimpleNamespace(model_name_or_path=folder, trust_remote_code=trust_remote_code)
    return train_checks.read_tokenizer(where, option="--model")


def check_adapter(asked: str, folder: str) -> None:
    """Refuses an adapter that cannot be loaded: no peft, no weights, damaged ones."""
    from hdpissa.engine.base_files import open_tensors

    if importlib.util.find_spec("peft") is None:
        raise ConfigError(f"--model {asked}: an adapter needs peft, which is not installed: pip install peft")
    there = [Path(folder) / name for name in ADAPTER_WEIGHTS if (Path(folder) / name).is_file()]
    if not there:
        raise ConfigError(
            f"--model {asked}: {folder} holds no {' and no '.join(ADAPTER_WEIGHTS)}; get the adapter again"
        )
    if there[0].suffix == ".safetensors":
        with open_tensors(there[0]):
            pass


def load(asked: str, folder: str, base: str | None, *, device: str | None, trust_remote_code: bool) -> Any:
    """The model in eval mode, on all GPUs, on the one that is asked for, or on the CPU; in the dtype that it has."""
    import torch
    from transformers import AutoModelForCausalLM

    from hdpissa.launch.train_checks import explained

    several = device is None and torch.cuda.device_count() > 1
    place = {"device_map": "auto"} if several else {}
    name = base or folder
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", trust_remote_code=trust_remote_code, **place)
        if base:
            from peft import PeftModel

            name = folder
            model = PeftModel.from_pretrained(model, folder)
        if not several:
            model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except Exception as error:  # files that do not fit each other, a device without room for them
        said, remedy = explained(name, error, "give a run's folder, a model's, or a hub name")
        raise ConfigError(f"--model {asked}: {name} cannot be loaded ({said}); {remedy}") from None
    return model.eval()
