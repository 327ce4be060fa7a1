"""HD-PiSSA on DeepSpeed ZeRO-3. `initialize` mirrors `deepspeed.initialize`.

Names are resolved at first use, so that checking a config does not import torch and DeepSpeed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import initialize, load_pretrained
    from .engine import HDPissaEngine
    from .errors import ConfigError
    from .results import StepResult

_HOMES = {
    "ConfigError": "errors",
    "HDPissaEngine": "engine",
    "StepResult": "results",
    "initialize": "api",
    "load_pretrained": "api",
}
__all__ = ["ConfigError", "HDPissaEngine", "StepResult", "initialize", "load_pretrained"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
