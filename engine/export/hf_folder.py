"""The files of a Hugging Face folder: which tensors in which file, the index, what an earlier export left.

Shared by the export of a running engine and the one from a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ..sharding.base_files import INDEX, SINGLE
from .report import ExportReport
from .streams import Entry, Outbox, dtype_name

MAX_FILE_BYTES = 5 * 10**9  # as transformers' save_pretrained

# An earlier export's weights; the first two are what transformers looks for.
STALE = (INDEX, SINGLE, "model-?????-of-?????.safetensors")


def plan_files(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """File name → its tensors, named and sized as transformers does."""
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


def publish_hf(outbox: Outbox, files: dict[str, list[Entry]], dtype: torch.dtype, step: int) -> ExportReport:
    """Adds index and report to what has been written, and gives the files their places; collective."""
    nbytes = sum(e.nbytes for entries in files.values() for e in entries)
    report = ExportReport("hf", str(outbox.folder), dtype_name(dtype), nbytes, step=step)
    outbox.guard(lambda: _write_index(outbox.partial, files))
    outbox.publish(report, SINGLE if SINGLE in files else INDEX, STALE)
    return report


def _write_index(folder: Path, files: dict[str, list[Entry]]) -> None:
    if SINGLE in files:
        return
    weight_map = {e.name: name for name, entries in files.items() for e in entries}
    total = sum(e.nbytes for entries in files.values() for e in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
