"""A folder with a PEFT LoRA adapter: its tensors, configuration and measured residual."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import torch

from ..errors import ConfigError
from .lora_format import CONFIG, WEIGHTS, LoraWeight, Truncation, adapter_config
from .lora_pairs import CutPair, FilePairs, Pair, entries
from .report import ExportReport, Residual
from .writer import ExportWriter, World, dtype_name, resolve_dtype

Measured = tuple[Residual | None, str]  # (residual, ""), or (None, why it is unknown)


def write_adapter(
    pairs: Sequence[Pair],
    folder: Path,
    world: World,
    measure_file: Callable[[Sequence[LoraWeight], FilePairs], Measured],
    *,
    dtype: str,
    rank: int | None,
    modules: Iterable[str],
    base: str,
    step: int,
    save_configs: Callable[[Path], object] = lambda partial: None,
) -> ExportReport:
    """Streams the tensors, measures them as they are in the file, and writes the rest; collective.

    Args:
        dtype: "fp32", "bf16", or "auto": fp32.
        rank: None for the whole adapter (2·r·S components per weight), else cuts it to at most this many.
        measure_file: measures what was written, collectively; not at fault for `FilePairs.problem`.
        modules, base: for `adapter_config`. step: for the report.
        save_configs: writes more files into a folder, on rank 0.

    Raises:
        ConfigError: on all ranks: unknown dtype, a rank below 1, or rank 0 cannot write there.
    """
    out, tail = resolve_dtype(dtype, torch.float32), Truncation()
    if rank is not None and rank < 1:
        raise ConfigError(f"export rank is {rank}: must be at least 1; leave it out for the whole adapter")
    written = [pair if rank is None else CutPair(pair, pair.weight.cut(rank), world, tail) for pair in pairs]
    weights = [pair.weight for pair in written]
    tensors = [entry for pair in written for entry in entries(pair, out)]
    nbytes, config = sum(e.nbytes for e in tensors), adapter_config(weights, modules, base)
    writer = ExportWriter(folder, world, nbytes=nbytes)
    writer.write(WEIGHTS, tensors)
    writer.agree()
    file = FilePairs(writer.partial / WEIGHTS, world)
    residual, unknown = None, ""
    try:
        residual, unknown = measure_file(weights, file)
    except Exception as error:
        if world.size > 1:  # the other ranks are in another collective
            raise
        writer.fail(error)
    if file.problem is not None:
        writer.fail(file.problem)
    writer.on_rank0(lambda: save_configs(writer.partial))
    writer.on_rank0(lambda: (writer.partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n"))
    report = ExportReport(
        "peft",
        str(folder),
        dtype_name(out),
        nbytes,
        r=config["r"],
        residual=residual,
        unknown=unknown,
        truncation=None if rank is None else tail.relative,
        step=step,
    )
    writer.publish(report, CONFIG)
    return report


def refuse_modules_to_save(names: Collection[str]) -> None:
    """Raises ConfigError where something is trained that is not in the adapter."""
    if names:
        raise ConfigError(
            f"an adapter cannot hold hd_pissa.modules_to_save ({', '.join(names)}), so their training would be lost: "
            f"export as 'hf', or train without them"
        )
