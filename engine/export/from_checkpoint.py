"""Exports from a checkpoint's files and the base model's: one process, no GPU, no model code, bounded memory.

hf     a target is the checkpoint's exact weight (full kind), or W_0 − s · Σ_i (ΣΔB_i A_i + B_i ΣΔA_i), a block of rows
       at a time (small kind); everything else is copied from the base.
peft   the pairs are the slices' files; the residual is measured where the checkpoint has the weights (full kind).

Every base tensor is compared with its checksum in the checkpoint once all of it has been read. The base's configuration
and tokenizer files are copied. Imports neither DeepSpeed nor transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hdpissa.kernels.reference import split_fp32

from ..checkpoint.manifest import TargetSpec
from ..checkpoint.reader import CheckpointReader
from ..errors import ConfigError
from ..files import checksum
from ..sharding.base_files import BaseFiles, local_folder
from ..sharding.slicing import ShardRange, SlicePlan
from .hf_folder import write_folder
from .lora_adapter import Measured, refuse_modules_to_save, write_adapter
from .lora_format import LoraWeight
from .lora_pairs import FilePairs, Pair
from .report import ExportReport
from .residual import Change, measure
from .writer import REPORT, Block, Entry, World, resolve_dtype

COMPUTE = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COPIED = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}  # of the base: configuration, tokenizer, code
OF_THE_MODEL = ("config.json", "generation_config.json")  # an adapter's folder must not look like a whole model
MAX_COPIED_BYTES = 100 * 2**20
BLOCK_ELEMENTS = 2 * 2**20  # of W, where sums are applied


def export_checkpoint(
    reader: CheckpointReader,
    folder: Path,
    *,
    format: str,
    dtype: str = "auto",
    rank: int | None = None,
    base_model: str | None = None,
    finish: Callable[[Path, Path], object] = lambda partial, base: None,
) -> ExportReport:
    """Writes and verifies one export of a checkpoint.

    Args:
        reader: whose files have been checked.
        format, dtype, rank: as in `HDPissaEngine.export`.
        base_model: folder or hub name of the base; None: the one that the checkpoint names.
        finish: adds files: (folder that is being written, folder of the base).

    Raises:
        ConfigError: the base is not on this machine, or is another one; the folder cannot be written.
    """
    if reader.manifest.base.dtype not in COMPUTE:
        raise ConfigError(
            f"{reader.folder} computed in {reader.manifest.base.dtype[:40]!r}: must be {' or '.join(COMPUTE)}"
        )
    with CheckedBase(reader, base_model or reader.manifest.base.name_or_path) as base:
        if base_model and not base.source:
            raise ConfigError(f"the base model {base_model} has no safetensors files here; give its folder or hub name")
        if format == "hf":
            return _export_hf(reader, base, folder, dtype, finish)
        return _export_peft(reader, base, folder, dtype, rank, finish)


# --- the base --------------------------------------------------------------------------------------


class CheckedBase(BaseFiles):
    """The base's files; a tensor that has been read through must have the checkpoint's checksum.

    Attributes:
        folder: on this machine; None where it is not there.
        compute: the dtype of the run.
    """

    def __init__(self, reader: CheckpointReader, name: str) -> None:
        super().__init__(name)
        self.name, self.folder = name, local_folder(name)
        self.compute = COMPUTE[reader.manifest.base.dtype]
        self._expected = reader.manifest.base.checksums
        self._targets = {f"{t.name}.weight" for t in reader.manifest.targets}
        self._sums: dict[str, tuple[int, int]] = {}  # name → (elements read, their checksum)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.slice(name).get_shape())

    def range(self, name: str, begin: int, end: int) -> Tensor:
        """Elements [begin, end) of a tensor of any shape, flat, in the file's dtype; ranges must come in order."""
        shape = self.shape(name)
        if shape:
            values = self.read(name, ShardRange(begin, end, torch.Size(shape[1:]).numel()))
        else:
            values = self.slice(name)[...].reshape(1)[begin:end]
        if name in self._expected:  # which has no buffers, and a tied weight under one of its names
            self._check(name, begin, values, torch.Size(shape).numel())
        return values

    def _check(self, name: str, begin: int, values: Tensor, numel: int) -> None:
        done, total = self._sums.pop(name, (0, 0))
        as_in_run = values.float() if name in self._targets else values.to(self.compute)
        done, total = done + values.numel(), checksum.add(total, checksum.checksum(as_in_run, begin))
        if done < numel:
            self._sums[name] = done, total
        elif f"{total:016x}" != self._expected[name]:
            raise ConfigError(
                f"the base model {self.name} is not the one that training began with: {name} differs; give that one"
            )

    def copy_files(self, folder: Path, *, but: Sequence[str] = ()) -> None:
        """Copies configuration and tokenizer files; those that end in `but` are left out."""
        for path in sorted(self.folder.iterdir()) if self.folder else ():
            wanted = path.suffix in COPIED and not path.name.endswith((".index.json", REPORT, *but))
            if wanted and path.is_file() and path.stat().st_size <= MAX_COPIED_BYTES:
                shutil.copyfile(path, folder / path.name)


# --- a Hugging Face folder -------------------------------------------------------------------------


def _export_hf(
    reader: CheckpointReader, base: CheckedBase, folder: Path, dtype: str, finish: Callable[[Path, Path], object]
) -> ExportReport:
    if not base.source or base.folder is None:
        raise ConfigError(
            f"the base model {base.name or '(none)'} has no safetensors files on this machine, and a checkpoint holds "
            f"only what was trained: give the base model's folder"
        )
    out, source = resolve_dtype(dtype, base.compute), base.folder
    targets = {f"{t.name}.weight": t for t in reader.manifest.targets}
    saved = reader.manifest.modules_to_save.numels if reader.manifest.modules_to_save else {}
    missing = [n for n, t in targets.items() if base.name_of([n], t.rows, t.cols) is None]
    if missing := missing + sorted(saved.keys() - base.source.keys()):
        t = targets.get(missing[0])
        of_shape = f" of {t.rows} x {t.cols}" if t else ""
        raise ConfigError(
            f"the base model {base.name} holds no {missing[0]}{of_shape}: give the one that training began with"
        )
    entries = []
    for name in sorted(base.source):
        shape = base.shape(name)
        stored = base.slice(name)[:0] if shape else base.slice(name)[...]
        kind = out if stored.dtype.is_floating_point else stored.dtype
        values: Callable[[int, int], Tensor] = partial(base.range, name)
        if name in targets:
            values = partial(_weights, reader, base, targets[name])
        elif name in saved:
            values = partial(reader.modules_to_save, name, "weight")
        exact = name in targets and kind == base.compute == torch.bfloat16
        block = Block([torch.Size(shape).numel()], partial(_rounded, values, None if exact else kind))
        entries.append(Entry(name, shape, kind, partial(iter, [block])))

    def save_configs(partial_folder: Path) -> None:
        base.copy_files(partial_folder)
        if (config := read_json(source / "config.json")) is not None:
            config = {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": str(out).split(".")[1]}
            (partial_folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        finish(partial_folder, source)

    return write_folder(entries, folder, World(), save_configs, dtype=out, step=reader.manifest.step)


def _rounded(values: Callable[[int, int], Tensor], dtype: torch.dtype | None, begin: int, end: int) -> Tensor:
    """In a dtype; None: to bf16 as the run's own weights are, so that both exports hold the same bits."""
    exact = values(begin, end)
    return split_fp32(exact)[0] if dtype is None else exact.to(dtype)


def _weights(reader: CheckpointReader, base: CheckedBase, t: TargetSpec, begin: int, end: int) -> Tensor:
    """Elements [begin, end) of a trained weight, flat fp32."""
    if reader.manifest.kind == "full":
        return reader.weights(t.name, begin, end)
    found = torch.empty(end - begin)
    step = max(1, BLOCK_ELEMENTS // t.cols) * t.cols
    for first in range(begin, end, step):
        here = ShardRange(first, min(first + step, end), t.cols)
        rows = slice(here.row_start, here.row_stop)
        D = torch.zeros(here.rows, t.cols)
        for slice_id in range(reader.manifest.slices):
            (A, B), (sum_A, sum_B) = reader.factors(slice_id, t.name), reader.delta_sum(slice_id, t.name)
            D.addmm_(sum_B[rows], A).addmm_(B[rows], sum_A)
        skip = here.start - here.row_start * t.cols
        W_0 = base.range(f"{t.name}.weight", here.start, here.stop).float()
        found[here.start - begin : here.stop - begin] = W_0 - t.scale * D.flatten()[skip : skip + here.numel]
    return found


def read_json(path: Path) -> dict | None:
    """A file's JSON object; None where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


# --- an adapter ------------------------------------------------------------------------------------


def _export_peft(
    reader: CheckpointReader,
    base: CheckedBase,
    folder: Path,
    dtype: str,
    rank: int | None,
    finish: Callable[[Path, Path], object],
) -> ExportReport:
    manifest = reader.manifest
    if manifest.modules_to_save:
        refuse_modules_to_save(manifest.modules_to_save.numels)
    pairs = [_pair(reader, t) for t in manifest.targets]
    whole = max(pair.weight.r for pair in pairs)
    if rank is not None and rank > whole:
        raise ConfigError(
            f"export rank is {rank}: the whole adapter has rank {whole}; give a smaller one or leave it out"
        )

    def save_configs(partial_folder: Path) -> None:
        if base.folder is not None:
            base.copy_files(partial_folder, but=(*OF_THE_MODEL, ".py"))
            finish(partial_folder, base.folder)

    return write_adapter(
        pairs,
        folder,
        World(),
        partial(_measure, reader, base),
        dtype=dtype,
        rank=rank,
        modules={name.rsplit(".", n)[0] for name in manifest.base.checksums for n in range(1, name.count(".") + 1)},
        base=base.name,
        step=manifest.step,
        save_configs=save_configs,
    )


def _pair(reader: CheckpointReader, t: TargetSpec) -> Pair:
    plan = SlicePlan(reader.manifest.slices, 1, 0)
    rows, cols = (t.cols, t.rows) if t.transposed else (t.rows, t.cols)

    def factors(index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (A, B), (sum_A, sum_B) = reader.factors(index, t.name), reader.delta_sum(index, t.name)
        return A, sum_A, B, sum_B

    return Pair(LoraWeight((t.name,), rows, cols, 2 * t.r * plan.slices, t.scale, t.transposed), plan, factors)


def _measure(reader: CheckpointReader, base: CheckedBase, weights: Sequence[LoraWeight], pairs: FilePairs) -> Measured:
    manifest = reader.manifest
    if manifest.kind == "small":
        left = f"; it leaves out {manifest.residual:.1e}" if manifest.residual is not None else ""
        return None, f"a small checkpoint has no weights to compare with{left}"
    changes = []
    for t, weight in zip(manifest.targets, weights, strict=True):
        name = f"{t.name}.weight"
        if base.name_of([name], t.rows, t.cols) is None:
            return None, f"the base {base.name or '(none)'} has no {name} on this machine"
        owned = ShardRange(0, t.rows * t.cols, t.cols)
        values = partial(reader.weights, t.name)
        changes.append(Change(weight, owned, owned.numel, values, partial(_base_values, base, name)))
    return measure(changes, pairs, updates=manifest.updates), ""


def _base_values(base: CheckedBase, name: str, where: ShardRange) -> Tensor:
    return base.range(name, where.start, where.stop).float()
