"""Exports from a checkpoint's files and the base model's: what comes from where, element by element.

hf     a target is the checkpoint's exact weight (full kind) or W_0 − s · Σ_i (ΣΔB_i A_i + B_i ΣΔA_i), row by row (small
       kind); everything else is copied from the base.
peft   the stacks are the slices' files; the residual is measured where the checkpoint has the weights (full kind).

Every base tensor that is read is compared with the checksum that the checkpoint has of it, as soon as all of it has
passed. The base's configuration and tokenizer files are copied; nothing of them is run. Imports neither DeepSpeed
nor transformers.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from hdpissa.engine.checkpoint import directory
from hdpissa.engine.checkpoint.manifest import MANIFEST, TargetSpec
from hdpissa.engine.checkpoint.reader import CheckpointReader
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.export.adapter import Adapted, stack_A, stack_B
from hdpissa.engine.export.hf_folder import plan_files, publish_hf
from hdpissa.engine.export.report import ExportReport, Residual
from hdpissa.engine.export.residual import Change, FilePairs, measure
from hdpissa.engine.export.stacks import AdapterFile, Stack
from hdpissa.engine.export.streams import DTYPES, REPORT, Block, Entry, Outbox, World
from hdpissa.engine.files import checksum
from hdpissa.engine.sharding.base_files import BaseFiles, local_folder
from hdpissa.engine.sharding.slicing import ShardRange, SlicePlan
from hdpissa.kernels.reference import split_fp32
from hdpissa.launch.exporting.template import GENERATION, read_config, write_stops, write_template

COMPUTE = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COPIED = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}  # of the base: configuration, tokenizer, code
OF_MODEL = {"config.json", GENERATION, REPORT}
MAX_COPIED_BYTES = 100 * 2**20
BLOCK_ELEMENTS = 2 * 2**20  # of W, when sums are applied


def open_checkpoint(path: str) -> CheckpointReader:
    """A checkpoint, or the best one in a folder of several, every file compared with its SHA-256.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        found = directory.candidates(folder) if folder.is_dir() else []
        if not found:
            raise ConfigError(f"--checkpoint {path}: {_instead(folder)}")
        folder = found[0]
    reader = CheckpointReader(folder)
    reader.check()
    return reader


def _instead(folder: Path) -> str:
    """Of a folder without checkpoints: a run may have kept none."""
    if not (folder / "run.json").is_file():
        return f"no {MANIFEST} there; give a folder checkpoint-N, or its parent"
    there = " and ".join(f"{folder / name}/" for name in ("model", "adapter") if (folder / name).is_dir())
    return f"that run kept no checkpoint; {f'its own export is {there}' if there else 'train with --save_steps'}"


def export(
    reader: CheckpointReader,
    folder: Path,
    *,
    format: str,
    dtype: str = "auto",
    rank: int | None = None,
    base_model: str | None = None,
) -> ExportReport:
    """One export of a checkpoint; see the module.

    Raises:
        ConfigError: the base is not there, or is another one; the folder cannot be written.
    """
    name = base_model or reader.manifest.base.name_or_path
    with CheckedBase(reader, name, asked=base_model is not None) as base:
        _refuse_tied(reader, base.folder)
        if format == "hf":
            return _export_hf(reader, base, folder, dtype)
        return _export_peft(reader, base, folder, dtype, rank)


def compute_dtype(reader: CheckpointReader) -> torch.dtype:
    """The dtype that the run computed in."""
    name = reader.manifest.base.dtype
    if name not in COMPUTE:
        raise ConfigError(f"{reader.folder} was computed in {name[:40]!r}: must be one of {', '.join(COMPUTE)}")
    return COMPUTE[name]


# --- the base --------------------------------------------------------------------------------------


class CheckedBase(BaseFiles):
    """The base's files; a tensor that has been read through must have the checkpoint's checksum.

    Attributes:
        folder: where it is on this machine; None where it is not.
    """

    def __init__(self, reader: CheckpointReader, name: str, *, asked: bool) -> None:
        super().__init__(name)
        self.name, self.folder = name, local_folder(name)
        self._expected = reader.manifest.base.checksums
        self._compute = compute_dtype(reader)
        self._targets = {f"{t.name}.weight" for t in reader.manifest.targets}
        self._read: dict[str, tuple[int, int]] = {}
        if asked and not self.source:
            raise ConfigError(f"--base_model {name}: no safetensors files there; give the base's folder or hub name")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.slice(name).get_shape())

    def range(self, name: str, begin: int, end: int) -> Tensor:
        """Elements [begin, end) of a tensor of any shape, in the file's dtype, checked."""
        shape = self.shape(name)
        if shape:
            values = self.read(name, ShardRange(begin, end, torch.Size(shape[1:]).numel()))
        else:
            values = self.slice(name)[...].reshape(1)[begin:end]
        self._check(name, begin, values, torch.Size(shape).numel())
        return values

    def _check(self, name: str, begin: int, values: Tensor, numel: int) -> None:
        if name not in self._expected:  # a buffer, or the other name of a tied weight
            return
        done, total = self._read.get(name, (0, 0))
        as_held = values.float() if name in self._targets else values.to(self._compute)  # as the run had it
        total = checksum.add(total, checksum.checksum(as_held, begin))
        done += values.numel()
        self._read[name] = done, total
        if done == numel:
            del self._read[name]
            if f"{total:016x}" != self._expected[name]:
                raise ConfigError(
                    f"the base model {self.name} is not the one that the checkpoint began with: {name} differs; "
                    f"give that one as --base_model"
                )


def _refuse_tied(reader: CheckpointReader, base: Path | None) -> None:
    """A trained output layer that is the embedding, too, can be told from the configuration only."""
    config = read_config(base)
    text = config.get("text_config") or config
    if config.get("tie_word_embeddings", text.get("tie_word_embeddings")):
        for t in reader.manifest.targets:
            if (t.rows, t.cols) == (text.get("vocab_size"), text.get("hidden_size")):
                raise ConfigError(
                    f"{t.name} shares its weight with the embedding, which this export does not write: export from the "
                    f"run itself (--export_format hf of launch/train.py)"
                )


# --- a Hugging Face folder -------------------------------------------------------------------------


def _export_hf(reader: CheckpointReader, base: CheckedBase, folder: Path, dtype: str) -> ExportReport:
    compute = compute_dtype(reader)
    out = compute if dtype == "auto" else DTYPES[dtype]
    if not base.source or base.folder is None:
        raise ConfigError(
            f"the base model {base.name or '(none)'} has no safetensors files on this machine, and the checkpoint "
            f"holds only what was trained: give it as --base_model"
        )
    targets = {f"{t.name}.weight": t for t in reader.manifest.targets}
    for name, t in targets.items():
        if base.name_of([name], t.rows, t.cols) is None:
            raise ConfigError(
                f"the base model {base.name} holds no {name} of {t.rows} x {t.cols}: give the one that training began "
                f"with as --base_model"
            )
    modules = reader.manifest.modules_to_save.numels if reader.manifest.modules_to_save else {}
    if lost := sorted(modules.keys() - base.source.keys()):
        raise ConfigError(
            f"the base model {base.name} holds no {lost[0]}, which was trained: give the one that training began with "
            f"as --base_model"
        )
    entries = []
    for name in sorted(base.source):
        stored = base.slice(name)[:0] if base.shape(name) else base.slice(name)[...]
        kind = out if stored.dtype.is_floating_point else stored.dtype
        numel = torch.Size(base.shape(name)).numel()
        part = functools.partial(_copied, base, name, kind)
        if name in targets:
            part = functools.partial(_trained, _weights(reader, base, targets[name]), kind, compute)
        elif name in modules:
            part = functools.partial(_module, reader, name, kind)
        entries.append(Entry(name, base.shape(name), kind, functools.partial(_one_block, numel, part)))
    files = plan_files(entries)
    outbox = Outbox(folder, World(), nbytes=sum(e.nbytes for e in entries))
    for file, some in files.items():
        outbox.write(file, some)
    outbox.guard(lambda: _copy_small_files(base.folder, outbox.partial, out))  # type: ignore[arg-type]
    outbox.guard(lambda: write_template(reader.manifest.client_state, outbox.partial))
    outbox.guard(lambda: write_stops(reader.manifest.client_state, base.folder, outbox.partial))
    outbox.agree()
    return publish_hf(outbox, files, out, reader.manifest.step)


def _one_block(numel: int, part: Callable[[int, int], Tensor]) -> Iterator[Block]:
    yield Block([numel], part)


def _copied(base: CheckedBase, name: str, dtype: torch.dtype, begin: int, end: int) -> Tensor:
    return base.range(name, begin, end).to(dtype)


def _trained(
    exact: Callable[[int, int], Tensor], dtype: torch.dtype, compute: torch.dtype, begin: int, end: int
) -> Tensor:
    """Rounded as the run's own bf16 weights are, so that both exports hold the same bits."""
    values = exact(begin, end)
    return split_fp32(values)[0] if dtype == compute == torch.bfloat16 else values.to(dtype)


def _module(reader: CheckpointReader, name: str, dtype: torch.dtype, begin: int, end: int) -> Tensor:
    """A parameter of `modules_to_save`, rounded as DeepSpeed does."""
    return reader.modules_to_save(name, "weight", begin, end).to(dtype)


def _weights(reader: CheckpointReader, base: CheckedBase, t: TargetSpec) -> Callable[[int, int], Tensor]:
    """A function that gives elements [begin, end) of a trained weight, flat fp32."""
    if reader.manifest.kind == "full":
        return functools.partial(reader.weights, t.name)
    return functools.partial(_from_sums, reader, base, t)


def _from_sums(reader: CheckpointReader, base: CheckedBase, t: TargetSpec, begin: int, end: int) -> Tensor:
    """W_0 − s · Σ_i (ΣΔB_i A_i + B_i ΣΔA_i), a block of rows after the other, slice by slice."""
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


def _copy_small_files(base: Path, folder: Path, dtype: torch.dtype) -> None:
    """Configuration and tokenizer of the base, with the export's dtype in config.json."""
    for path in sorted(base.iterdir()):
        known = path.suffix in COPIED and not path.name.endswith(".index.json") and path.name != REPORT
        if known and path.is_file() and path.stat().st_size <= MAX_COPIED_BYTES:
            shutil.copyfile(path, folder / path.name)
    config = read_config(base)
    if config:
        config = {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": str(dtype).split(".")[1]}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _copy_tokenizer(base: Path, folder: Path) -> None:
    """What `AutoTokenizer` reads, so that the adapter's folder can stand for the model; nothing of the model itself."""
    for path in sorted(base.iterdir()):
        of_model = path.name.endswith(".index.json") or path.name in OF_MODEL or path.suffix == ".py"
        if path.suffix in COPIED and not of_model and path.is_file() and path.stat().st_size <= MAX_COPIED_BYTES:
            shutil.copyfile(path, folder / path.name)


# --- an adapter ------------------------------------------------------------------------------------


def _export_peft(
    reader: CheckpointReader, base: CheckedBase, folder: Path, dtype: str, rank: int | None
) -> ExportReport:
    if trained := reader.manifest.modules_to_save:
        raise ConfigError(
            f"{reader.folder} holds modules_to_save ({', '.join(trained.numels)}), which an adapter "
            f"cannot hold: give --format hf"
        )
    plan = SlicePlan(reader.manifest.slices, 1, 0)
    stacks = [_stack(reader, t, plan) for t in reader.manifest.targets]
    whole = max(stack.adapted.r for stack in stacks)
    if rank is not None and rank > whole:
        raise ConfigError(f"--rank is {rank}: the whole adapter has rank {whole}; give a smaller one or leave it out")
    file = AdapterFile(stacks, folder, World(), dtype=dtype, rank=rank)
    residual, unknown = _measure(reader, base, file)
    if base.folder is not None:
        file.outbox.guard(lambda: _copy_tokenizer(base.folder, file.outbox.partial))  # type: ignore[arg-type]
        file.outbox.guard(lambda: write_template(reader.manifest.client_state, file.outbox.partial))
    modules = {name.rsplit(".", n)[0] for name in reader.manifest.base.checksums for n in range(1, name.count(".") + 1)}
    return file.publish(modules, base.name, reader.manifest.step, residual, unknown)


def _stack(reader: CheckpointReader, t: TargetSpec, plan: SlicePlan) -> Stack:
    rows, cols = (t.cols, t.rows) if t.transposed else (t.rows, t.cols)
    adapted = Adapted((t.name,), rows, cols, 2 * t.r * plan.slices, t.scale, t.transposed)

    def halves(index: int, which: int) -> tuple[Tensor, Tensor]:
        """(A and ΣΔA, or B and ΣΔB) of a slice, as a Linear has them: a transposed pair is (Bᵀ, Aᵀ)."""
        if t.transposed:
            return reader.factors(index, t.name)[1 - which].t(), reader.delta_sum(index, t.name)[1 - which].t()
        return reader.factors(index, t.name)[which], reader.delta_sum(index, t.name)[which]

    def of_slice(index: int) -> Tensor:
        return stack_A(*halves(index, 0))

    def of_rows(first: int, last: int) -> Tensor:
        pairs = (halves(index, 1) for index in range(plan.slices))
        return stack_B((B[first:last].clone(), sum_B[first:last].clone()) for B, sum_B in pairs)

    return Stack(adapted, plan, of_slice, of_rows)


def _measure(reader: CheckpointReader, base: CheckedBase, file: AdapterFile) -> tuple[Residual | None, str]:
    manifest = reader.manifest
    if manifest.kind == "small":
        left = f"; it leaves out {manifest.residual:.1e}" if manifest.residual is not None else ""
        return None, f"a small checkpoint has no weights to compare with{left}"
    changes = []
    for t, adapted in zip(manifest.targets, file.adapted, strict=True):
        name = f"{t.name}.weight"
        if base.name_of([name], t.rows, t.cols) is None:
            return None, f"the base {base.name or '(none)'} has no {name} on this machine"
        owned = ShardRange(0, t.rows * t.cols, t.cols)
        trained = functools.partial(reader.weights, t.name)
        changes.append(Change(adapted, owned, owned.numel, trained, functools.partial(_base_range, base, name)))
    residual = []
    file.outbox.guard(
        lambda: residual.append(measure(changes, FilePairs(file.weights, World()), updates=manifest.updates))
    )
    file.outbox.agree()
    return residual[0], ""


def _base_range(base: CheckedBase, name: str, where: ShardRange) -> Tensor:
    return base.range(name, where.start, where.stop).float()
