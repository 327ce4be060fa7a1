"""The exact fp32 values of a rank's shards, read from the checkpoint's own files.

ZeRO-3 rounds weights to the compute dtype while it loads them, so under bf16 compute the values of an fp32
checkpoint are gone when the model stands. Each rank therefore reads the rows of its own shards once
more from the safetensors files: O(shard) memory, in parallel, no communication. That a file's name means
the parameter is *proved*, not assumed: its rounding must equal the shard that ZeRO-3 holds.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from . import zero3
from .slicing import SlicePlan
from .targets import Target

logger = logging.getLogger(__name__)


def exact_values(model: nn.Module, targets: Sequence[Target], plan: SlicePlan) -> Iterator[tuple[Target, Tensor]]:
    """Yields (target, this rank's elements in fp32), target by target; collective.

    Where the files have nothing that agrees with the shard (renamed, fused or quantised weights, `.bin`
    files, weights changed after loading) the shard's own rounded values are taken, with a warning.
    """
    if zero3.shard_view(targets[0].param).dtype == torch.float32:
        yield from ((t, zero3.shard_view(t.param).clone()) for t in targets)
        return
    origin = getattr(model, "name_or_path", "") or ""
    source = checkpoint_files(origin)
    names = _names_by_param(model)
    rounded = []
    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in set(source.values())}
        for target in targets:
            value = _read(target, plan, names[id(target.param)], source, files)
            if not _agreed(value is not None):
                value = zero3.shard_view(target.param).float()
                rounded.append(target.name)
            yield target, value
    if rounded and origin and plan.rank == 0:
        logger.warning(
            "%d of %d targets start from bf16-rounded values: no safetensors file of %s agrees with them (first: %s)",
            len(rounded),
            len(targets),
            origin,
            rounded[0],
        )


def checkpoint_files(folder_or_name: str) -> dict[str, str]:
    """Tensor name → safetensors file that holds it; empty when there are none on this machine."""
    folder = _local_folder(folder_or_name)
    if folder is None:
        return {}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        return {name: str(folder / file) for name, file in weight_map.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        return {}
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), str(single))


def _local_folder(folder_or_name: str) -> Path | None:
    if not folder_or_name:
        return None
    if Path(folder_or_name).is_dir():
        return Path(folder_or_name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:  # from_pretrained has just filled the cache
        return Path(snapshot_download(folder_or_name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _names_by_param(model: nn.Module) -> dict[int, list[str]]:
    """Every name of every parameter; a tied one has several, the files know one of them."""
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    return names


def _read(target: Target, plan: SlicePlan, names: list[str], source: dict, files: dict) -> Tensor | None:
    """This rank's elements from the first file tensor that agrees with the shard; None if none does."""
    owned, shard = target.own_range(plan), zero3.shard_view(target.param)
    for name in names:
        if name not in source:
            continue
        stored = files[source[name]].get_slice(name)
        if list(stored.get_shape()) != [target.rows, target.cols]:
            continue
        rows = stored[owned.row_start : owned.row_stop].float().flatten()
        first = owned.start - owned.row_start * owned.cols
        value = rows[first : first + owned.numel].to(shard.device)
        if torch.equal(value.to(shard.dtype), shard):
            return value
    return None


def _agreed(mine: bool) -> bool:
    """Whether it holds on every rank."""
    flag = torch.tensor([int(mine)], device=zero3.device())
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())
