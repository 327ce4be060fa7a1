"""The files of a checkpoint and their manifest: one process, no communication, no pickle.

    checkpoint.json                       the manifest: what the run was, SHA-256 and size of every other file
    weights-00000-of-00002.safetensors    full kind: a saving rank's exact fp32 values, `<target>[start:stop]`
    slice-00003.safetensors               a slice's running sums of ΔA, ΔB and its Adam moments
    factors-00003.safetensors             a slice's A and B, which never change: the same file in every checkpoint
    modules_to_save-00000-of-00002.safetensors   if there are any, a saving rank's part of their fp32 weights and
                                          Adam moments, `<parameter>.<state>[start:stop]`
    rng-00001.safetensors                 a saving rank's random number generators
    trainer_state.json                    and the like: what the caller added (`extra_files`)

State is named by slice and by range of a weight, never by rank, so any number of ranks can read it. Weights that are
not trained are the base model's; the manifest holds their checksums. A file is believed only when the manifest lists
it and its SHA-256 agrees; the manifest holds its own. The checksums protect against accidents, not against forgery;
but a forged checkpoint cannot run code, or name a file outside its folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer

from ..errors import ConfigError, one_line
from ..files.disk import FileRecord, read_record

FORMAT = 1
MANIFEST = "checkpoint.json"
MAX_MANIFEST_BYTES = 2**28
STATE = ("exp_avg", "exp_avg_sq", "delta_sum")  # names of flat buffers of `FactorStore`
MODULE_STATE = ("weight", "exp_avg", "exp_avg_sq")  # of `modules_to_save`
Kind = Literal["full", "small"]
REMEDY = "give another checkpoint"
_SHA256 = re.compile("[0-9a-f]{64}")


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used as it is: damaged, or of another run."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TargetSpec(_Strict):
    """A trained weight (rows × cols), its slices' rank and scale; see `targets.Target`."""

    name: str
    rows: int = Field(gt=0)
    cols: int = Field(gt=0)
    r: int = Field(gt=0)
    scale: float
    transposed: bool = False

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: Any) -> dict[str, Any]:
        """Omits `transposed` where it is false."""
        return {key: value for key, value in serialize(self).items() if key != "transposed" or value}


class Base(_Strict):
    """The model before training: where it came from, its compute dtype, every parameter's checksum in hex."""

    name_or_path: str
    dtype: str
    checksums: dict[str, str]


class StoredModules(_Strict):
    """The `modules_to_save`, which DeepSpeed trains: name → elements, and the last learning rate."""

    numels: dict[str, int]
    learning_rate: float


class StoredFile(_Strict):
    """Size and SHA-256 of a file."""

    bytes: int = Field(ge=0)
    sha256: str


class Manifest(_Strict):
    """What a checkpoint is.

    Attributes:
        step, skipped_steps: optimizer steps done, and those of them that changed nothing. updates: Adam's t.
        adam: beta1, beta2, eps.
        exact: whether the weights are in it, or follow from its sums but for rounding.
        largest_grad: bound of any gradient that Adam has seen; see `overflow_guard`.
        world_size: ranks that saved it. slices: S.
        residual: small kind: ‖ΔW that it leaves out‖ / ‖ΔW‖ where it was measured, else None.
        init_residual, init_worst: what the decomposition had reached, and where.
        client_state: the caller's, JSON-serialisable.
        modules_to_save: None where there are none.
        extra_files: names of the caller's own files.
    """

    kind: Kind
    step: int = Field(ge=0)
    skipped_steps: int = Field(ge=0)
    skipped_in_a_row: int = Field(ge=0)
    updates: int = Field(ge=0)
    largest_grad: float
    learning_rate: float
    world_size: int = Field(gt=0)
    slices: int = Field(gt=0)
    second_order: bool
    adam: dict[str, float]
    exact: bool
    residual: float | None
    init_residual: float
    init_worst: str
    targets: list[TargetSpec]
    base: Base
    versions: dict[str, str]
    client_state: dict[str, Any]
    files: dict[str, StoredFile]
    modules_to_save: StoredModules | None = None
    extra_files: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,100}\.json$")]] = []

    def render(self) -> str:
        """The file's text, with the SHA-256 of its content."""
        content = self.model_dump(mode="json")
        for name in ("modules_to_save", "extra_files"):  # left out where empty
            if not content[name]:
                del content[name]
        return json.dumps({"format": FORMAT, "sha256": _digest(content), "content": content}, indent=1) + "\n"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- names -----------------------------------------------------------------------------------------


def weights_file(rank: int, world_size: int) -> str:
    return f"weights-{rank:05d}-of-{world_size:05d}.safetensors"


def slice_file(slice_id: int) -> str:
    return f"slice-{slice_id:05d}.safetensors"


def factors_file(slice_id: int) -> str:
    return f"factors-{slice_id:05d}.safetensors"


def modules_file(rank: int, world_size: int) -> str:
    return f"modules_to_save-{rank:05d}-of-{world_size:05d}.safetensors"


def rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.safetensors"


def range_key(target: str, start: int, stop: int) -> str:
    """The key of elements [start, stop) of a weight, flat."""
    return f"{target}[{start}:{stop}]"


def file_names(kind: str, slices: int, world_size: int, *, modules: bool = False) -> list[str]:
    """All files of a checkpoint but the manifest."""
    names = [modules_file(k, world_size) for k in range(world_size) if modules]
    names += [slice_file(i) for i in range(slices)] + [factors_file(i) for i in range(slices)]
    names += [rng_file(k) for k in range(world_size)]
    return names + [weights_file(k, world_size) for k in range(world_size) if kind == "full"]


# --- reading ---------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError unless the manifest is there, whole, and lists just the files it must."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_MANIFEST_BYTES} bytes: {REMEDY}")
        text = path.read_text()
        outer = json.loads(text)
        if not isinstance(outer, dict) or set(outer) != {"format", "sha256", "content"}:
            raise ValueError("not the keys format, sha256, content")
        if outer["format"] != FORMAT:
            raise CheckpointError(f"{path} is of format {outer['format']!r}, this version reads {FORMAT}: {REMEDY}")
        if outer["sha256"] != _digest(outer["content"]):
            raise ValueError("its content is not what was written")
        manifest = Manifest.model_validate_json(json.dumps(outer["content"]))
        if manifest.render() != text:
            raise ValueError("its text is not what was written")
    except (OSError, ValidationError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be used ({one_line(error, 160)}): {REMEDY}") from None
    _check_files(folder, manifest)
    return manifest


def _check_files(folder: Path, manifest: Manifest) -> None:
    if manifest.slices + manifest.world_size > len(manifest.files):  # before a forged number makes a long list
        raise CheckpointError(f"{folder / MANIFEST} lists too few files: {REMEDY}")
    modules = manifest.modules_to_save is not None
    wanted = {*file_names(manifest.kind, manifest.slices, manifest.world_size, modules=modules), *manifest.extra_files}
    odd = sorted(wanted ^ set(manifest.files))
    odd += [name for name, record in manifest.files.items() if not _SHA256.fullmatch(record.sha256)]
    if odd:
        raise CheckpointError(f"{folder / MANIFEST} lists its files wrongly (first: {odd[0][:80]}): {REMEDY}")


def check_file(folder: Path, name: str, record: StoredFile) -> None:
    """Raises CheckpointError unless a file has the bytes that the manifest says."""
    path = folder / name
    try:
        if path.stat().st_size != record.bytes:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, must have {record.bytes}: {REMEDY}")
        found = read_record(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({one_line(error, 160)}): {REMEDY}") from None
    if found != FileRecord(record.bytes, record.sha256):
        raise CheckpointError(f"{path} is damaged (its SHA-256 is not the manifest's): {REMEDY}")
