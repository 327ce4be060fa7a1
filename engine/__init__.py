"""HD-PiSSA on DeepSpeed ZeRO-3. `initialize` mirrors `deepspeed.initialize`.

Names are resolved at first use, so that checking a config does not import torch and DeepSpeed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import HDPissaEngine, StepResult, initialize, load_pretrained
    from .errors import ConfigError

__all__ = ["ConfigError", "HDPissaEngine", "StepResult", "initialize", "load_pretrained"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = "errors" if name == "ConfigError" else "engine"
    return getattr(import_module(f".{home}", __name__), name)
