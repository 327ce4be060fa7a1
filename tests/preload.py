"""Imported once by the fork server (see ranks.py). Imports only: no torch operation may run here.

Beside the obvious, what DeepSpeed and transformers import late, at first use (2,000 modules, ten seconds), and the
package's own modules, which import each other late, too. In the end the garbage collector is told to leave all that
alone: DeepSpeed collects at its start, and a fork that looks at every object copies the memory that it shares.

Ranks run on the CPU, with kernels in Triton's interpreter, also where the tests beside them have a GPU: both are told
here, before anything is imported, because a process that has looked for a GPU cannot forget it, nor can its forks.
"""

import gc
import importlib
import os
import pkgutil

os.environ.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")

import datasets
import deepspeed.module_inject.auto_ep_layer
import deepspeed.ops.op_builder.all_ops
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer
import matplotlib.figure
import setuptools.command
import torch._inductor.compile_fx
import torch._subclasses.schema_check_mode
import torch.profiler._cupti_monitor
import transformers.conversion_mapping
import transformers.integrations.deepspeed
import transformers.modeling_utils
import transformers.models.llama.modeling_llama

import hdpissa.engine
import hdpissa.kernels
import hdpissa.launch

for package in (hdpissa.engine, hdpissa.launch):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
for module in ("api", "reference", "available"):  # the others need Triton, and choose its mode when imported
    importlib.import_module(f"hdpissa.kernels.{module}")
for module in ("engine_runs", "tiny", "launch_runs", "checkpoint_runs"):
    importlib.import_module(module)

gc.collect()
gc.freeze()
