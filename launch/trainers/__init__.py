"""HD-PiSSA inside `transformers.Trainer` and TRL: the classes that users know, with this project's engine below.

    from hdpissa.launch.trainers import HDPissaSFTTrainer

    args = SFTConfig(output_dir="out", deepspeed="ds_configs/zero3.json", ...)   # the JSON has the section `hd_pissa`
    HDPissaSFTTrainer(model="meta-llama/Llama-3.1-8B", args=args, train_dataset=dataset).train()

A trainer of one's own: `class MyTrainer(HDPissaMixin, trl.SomeTrainer)`. Import this package before the arguments are
made: on CPU ranks accelerate needs `accelerate_cpu`'s patch by then. Names are resolved at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import accelerate_cpu

if TYPE_CHECKING:
    from .arguments import (
        HDPissaArguments,
        HDPissaDPOConfig,
        HDPissaGRPOConfig,
        HDPissaKTOConfig,
        HDPissaRewardConfig,
        HDPissaSFTConfig,
        HDPissaTrainingArguments,
    )
    from .classes import (
        HDPissaDPOTrainer,
        HDPissaGRPOTrainer,
        HDPissaKTOTrainer,
        HDPissaRewardTrainer,
        HDPissaSFTTrainer,
        HDPissaTrainer,
    )
    from .mixin import HDPissaMixin

_HOMES = {
    "HDPissaMixin": "mixin",
    **dict.fromkeys(
        ["HDPissaTrainer", *(f"HDPissa{kind}Trainer" for kind in ("SFT", "DPO", "GRPO", "KTO", "Reward"))], "classes"
    ),
    **dict.fromkeys(
        [
            "HDPissaArguments",
            "HDPissaTrainingArguments",
            *(f"HDPissa{kind}Config" for kind in ("SFT", "DPO", "GRPO", "KTO", "Reward")),
        ],
        "arguments",
    ),
}
__all__ = [
    "HDPissaArguments",
    "HDPissaDPOConfig",
    "HDPissaDPOTrainer",
    "HDPissaGRPOConfig",
    "HDPissaGRPOTrainer",
    "HDPissaKTOConfig",
    "HDPissaKTOTrainer",
    "HDPissaMixin",
    "HDPissaRewardConfig",
    "HDPissaRewardTrainer",
    "HDPissaSFTConfig",
    "HDPissaSFTTrainer",
    "HDPissaTrainer",
    "HDPissaTrainingArguments",
]

accelerate_cpu.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
