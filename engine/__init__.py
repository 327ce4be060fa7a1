"""HD-PiSSA on DeepSpeed ZeRO-3. `initialize` mirrors `deepspeed.initialize`."""

from .engine import HDPissaEngine, StepResult, initialize, load_pretrained
from .errors import ConfigError

__all__ = ["ConfigError", "HDPissaEngine", "StepResult", "initialize", "load_pretrained"]
