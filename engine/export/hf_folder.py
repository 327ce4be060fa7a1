"""A Hugging Face folder: safetensors files of at most 5 GB, their index, configurations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..sharding.base_files import INDEX, SINGLE
from .report import ExportReport
from .writer import Entry, ExportWriter, World, dtype_name

MAX_FILE_BYTES = 5 * 10**9  # as transformers' save_pretrained


def write_folder(
    entries: Sequence[Entry],
    folder: Path,
    world: World,
    save_configs: Callable[[Path], None],
    *,
    dtype: torch.dtype,
    step: int,
) -> ExportReport:
    """Writes tensors, index and configurations; collective.

    Args:
        save_configs: writes them into a folder, on rank 0.
        dtype, step: for the report.

    Raises:
        ConfigError: on all ranks: rank 0 cannot write there.
    """
    files, nbytes = _plan_files(entries), sum(e.nbytes for e in entries)
    writer = ExportWriter(folder, world, nbytes=nbytes)
    for name, some in files.items():
        writer.write(name, some)
    writer.on_rank0(lambda: save_configs(writer.partial))
    report = ExportReport("hf", str(folder), dtype_name(dtype), nbytes, step=step)
    if SINGLE not in files:
        weight_map = {e.name: name for name, some in files.items() for e in some}
        index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
        writer.on_rank0(lambda: (writer.partial / INDEX).write_text(json.dumps(index, indent=2) + "\n"))
    writer.publish(report, SINGLE if SINGLE in files else INDEX)
    return report


def _plan_files(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """File name → its tensors, cut and named as transformers does."""
    files: list[list[Entry]] = [[]]
    used = 0
    for entry in entries:
        if files[-1] and used + entry.nbytes > MAX_FILE_BYTES:
            files.append([])
            used = 0
        files[-1].append(entry)
        used += entry.nbytes
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": some for i, some in enumerate(files, 1)}
