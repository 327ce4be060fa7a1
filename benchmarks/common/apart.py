"""Runs a function in a process of its own, so that its memory is its own and is given back.

DeepSpeed never lets go of an engine: its gradient hooks hold it until the process ends. A fork server imports torch,
transformers and DeepSpeed once and computes nothing, so that a further process starts in a fraction of a second. With a
torch that knows GPUs every process starts anew: already the question whether there is one, which imports ask, leaves
CUDA in a state that no fork may use.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import Any

import torch

# With what DeepSpeed and transformers import late, at first use. Imports only: threads do not survive a fork.
PRELOADED = (
    *("hdpissa.benchmarks.step.method_zero3", "peft", "torch._inductor.compile_fx"),
    *("transformers.models.llama.modeling_llama", "transformers.conversion_mapping", "transformers.integrations.peft"),
    *("transformers.integrations.deepspeed", "transformers.generation", "deepspeed.runtime.zero.muon.muon_optimizer"),
)


def call(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a new process; all of them picklable, the function by its name.

    Raises:
        Exception: what the function raises, with its traceback as the cause.
        BrokenProcessPool: the process was killed, for memory perhaps.
    """
    with ProcessPoolExecutor(1, mp_context=way_to_start()) as pool:
        return pool.submit(function, *args).result()


def way_to_start(preloaded: Sequence[str] = PRELOADED) -> BaseContext:
    """How a process starts: forked from a server that has imported some modules, or anew where torch is built for GPUs,
    with or without one.
    """
    if torch.version.cuda or torch.version.hip:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preloaded))
    return context
