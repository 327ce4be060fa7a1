"""The trained model as a Hugging Face folder, streamed: no process ever holds more than a shard of a tensor.

What is written how is here; pieces, files and failures are the business of `streams`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..method.targets import Target
from ..sharding import zero3
from ..sharding.slicing import SlicePlan
from .hf_folder import plan_files, publish_hf
from .report import ExportReport
from .streams import DTYPES, Block, Entry, Outbox, World


def export_hf(
    model: nn.Module, targets: Sequence[Target], plan: SlicePlan, folder: Path, *, dtype: str, step: int
) -> ExportReport:
    """Writes safetensors, index, config.json and generation_config.json, and verifies them; collective.

    Args:
        dtype: "bf16", "fp32" or "auto" (the compute dtype). Under bf16 compute "fp32" gives the exact
            master of every target and of `modules_to_save`; everything else has only its bf16 value.
        step: for the report.

    Raises:
        ConfigError: unknown dtype; or, on all ranks, rank 0 cannot write there.
    """
    out = _resolve(dtype, zero3.shard_view(targets[0].param).dtype)
    world = World(plan.rank, plan.world_size, zero3.device())
    files = plan_files(list(_entries(model, targets, plan, out)))
    outbox = Outbox(folder, world, nbytes=sum(e.nbytes for entries in files.values() for e in entries))
    for name, entries in files.items():
        outbox.write(name, entries)
    outbox.guard(lambda: _save_configs(model, outbox.partial, out))
    return publish_hf(outbox, files, out, step)


def _resolve(dtype: str, compute: torch.dtype) -> torch.dtype:
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"export dtype is {dtype!r}: must be 'auto', 'bf16' or 'fp32'")
    return compute if dtype == "auto" else DTYPES[dtype]


def _entries(model: nn.Module, targets: Sequence[Target], plan: SlicePlan, out: torch.dtype) -> Iterator[Entry]:
    """Every parameter once (tied ones under their first name) and every persistent buffer."""
    exact = {id(t.param): t for t in targets}
    for name, param in model.named_parameters():
        numel = zero3.full_numel(param)
        size = -(-numel // plan.world_size)
        sizes = [max(0, min(size, numel - k * size)) for k in range(plan.world_size)]
        block = Block(sizes, _part(param, exact.get(id(param)), out))
        yield Entry(name, tuple(zero3.full_shape(param)), out, functools.partial(_alone, block))
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved:  # replicated: rank 0's is enough
            block = Block([buffer.numel()] + [0] * (plan.world_size - 1), functools.partial(_range, buffer))
            yield Entry(name, tuple(buffer.shape), buffer.dtype, functools.partial(_alone, block))


def _alone(block: Block) -> Iterator[Block]:
    yield block


def _range(tensor: Tensor, begin: int, end: int) -> Tensor:
    return tensor.flatten()[begin:end]


def _part(param: nn.Parameter, target: Target | None, out: torch.dtype) -> Callable[[int, int], Tensor]:
    def part(begin: int, end: int) -> Tensor:
        if target is not None and target.shard is not None and out == torch.float32:
            return target.shard.read(begin, end)
        if param.requires_grad and out == torch.float32:
            return zero3.trained_state(param)[begin:end]
        return zero3.shard_view(param)[begin:end].to(out)

    return part


def _save_configs(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    config = copy.deepcopy(getattr(model, "config", None))
    if config is None:  # a plain torch module
        return
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)  # type: ignore[union-attr,operator]
