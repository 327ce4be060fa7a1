"""The methods that the comparison scripts set side by side, behind one interface.

    method = build("hd_pissa", Setting(model="tiny"))
    for batch in micro_batches:
        loss = method.micro_step(batch)
    method.step(lr=2e-5)

| name | what it is |
| --- | --- |
| hd_pissa | our engine |
| lora, pissa | stock PEFT under DeepSpeed ZeRO-3 with AdamW |
| full | every weight, DeepSpeed ZeRO-3 with AdamW |
| frozen | forward and input gradient under ZeRO-3, nothing trained: the floor of the methods above |
| reference | the published algorithm, our own writing of it (method_reference.py): fp32 whole in every process |

Those under ZeRO-3 share one DeepSpeed config, that of the project's own configs. In all but `full` and `reference` the
input embeddings require grad, so that every Linear computes its input gradient.
"""

from __future__ import annotations

import torch

from hdpissa.benchmarks.step import wire
from hdpissa.benchmarks.step.method_base import DTYPES, Method, Setting
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.sharding import zero3

__all__ = ["DTYPES", "METHODS", "Method", "Setting", "build"]

METHODS = ("hd_pissa", "lora", "pissa", "full", "frozen", "reference")


def build(name: str, setting: Setting) -> Method:
    """Makes a method over a freshly loaded model; collective.

    Raises:
        ConfigError: no such method, or a setting that does not go with it or with the number of processes.
    """
    if name not in METHODS:
        raise ConfigError(f"method {name}: there is none of this name; give one of {', '.join(METHODS)}")
    if setting.dtype not in DTYPES:
        raise ConfigError(f"dtype {setting.dtype}: must be one of {', '.join(DTYPES)}")
    wire.Wire.of_process()
    zero3.init_distributed()
    torch.manual_seed(setting.seed)
    # late: they import transformers
    if name == "reference":
        from hdpissa.benchmarks.step.method_reference import Reference

        return Reference(setting)
    from hdpissa.benchmarks.step import method_zero3

    return method_zero3.Slices(setting) if name == "hd_pissa" else method_zero3.Stock(name, setting)
