"""Reading the tensors of a checkpoint, whatever the number of ranks that saved it; no communication."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import one_line
from ..sharding.slicing import ShardRange
from .manifest import (
    MODULE_STATE,
    REMEDY,
    STATE,
    CheckpointError,
    check_file,
    factors_file,
    modules_file,
    range_key,
    read_manifest,
    rng_file,
    slice_file,
    weights_file,
)


class CheckpointReader:
    """A checkpoint's tensors, by name; what is read is checked for shape and dtype. Files are mapped, not loaded.

    Args:
        folder: of the checkpoint. Call `check` first: only files that agree with their SHA-256 are worth reading.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.specs = {t.name: t for t in self.manifest.targets}
        self._open_files: dict[str, Any] = {}  # a header of many thousand keys is parsed once

    def check(self, names: list[str] | None = None) -> None:
        """Compares files, default all, with the manifest; raises CheckpointError."""
        for name in sorted(self.manifest.files) if names is None else names:
            check_file(self.folder, name, self.manifest.files[name])

    def check_headers(self, names: list[str]) -> None:
        """Looks whether files hold the tensors they must, before anything is taken from any; raises CheckpointError."""
        for name in set(names) - set(self.manifest.extra_files):
            file, wanted = self._open(name), self._tensors_of(name)
            if wanted is not None and set(file.keys()) != wanted.keys():
                raise CheckpointError(f"{self.folder / name} does not hold the tensors it must: {REMEDY}")
            for key, shape in (wanted or {}).items():
                self._read(file, key, shape, slice(0, 0))

    def _tensors_of(self, name: str) -> dict[str, tuple[int, ...]] | None:
        """key → shape of a file's tensors; None for generators, which differ from device to device."""
        kind, number = name.split("-")[0], int(name.split("-")[1].split(".")[0])
        if kind == "rng":
            return None
        found: dict[str, tuple[int, ...]] = {}
        if kind == "modules_to_save":
            numels = self.manifest.modules_to_save.numels if self.manifest.modules_to_save else {}
            for param, numel in numels.items():
                part = ShardRange.of(number, self.manifest.world_size, numel, 1)
                keys = (range_key(f"{param}.{state}", part.start, part.stop) for state in MODULE_STATE if part.numel)
                found |= dict.fromkeys(keys, (part.numel,))
            return found
        for t in self.manifest.targets:
            A, B = (t.r, t.cols), (t.rows, t.r)
            if kind == "factors":
                found |= {f"{t.name}.A": A, f"{t.name}.B": B}
            elif kind == "slice":
                found |= {f"{t.name}.{s}_{side}": shape for s in STATE for side, shape in (("A", A), ("B", B))}
            else:
                part = ShardRange.of(number, self.manifest.world_size, t.rows, t.cols)
                found |= {range_key(t.name, part.start, part.stop): (part.numel,)} if part.numel else {}
        return found

    def close(self) -> None:
        """Closes the files: a mapped file occupies disk space after it was removed."""
        self._open_files.clear()

    def slice_state(self, slice_id: int) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """Yields (target, which of `STATE`, A part: R × I, B part: O × R), fp32."""
        file = self._open(slice_file(slice_id))
        for t in self.manifest.targets:
            for state in STATE:
                A = self._read(file, f"{t.name}.{state}_A", (t.r, t.cols))
                yield t.name, state, A, self._read(file, f"{t.name}.{state}_B", (t.rows, t.r))

    def delta_sum(self, slice_id: int, target: str) -> tuple[Tensor, Tensor]:
        """Σ ΔA (R × I) and Σ ΔB (O × R) of one target."""
        t = self.specs[target]
        file = self._open(slice_file(slice_id))
        A = self._read(file, f"{target}.delta_sum_A", (t.r, t.cols))
        return A, self._read(file, f"{target}.delta_sum_B", (t.rows, t.r))

    def factors(self, slice_id: int, target: str) -> tuple[Tensor, Tensor]:
        """A (R × I) and B (O × R), fp32."""
        t = self.specs[target]
        file = self._open(factors_file(slice_id))
        return self._read(file, f"{target}.A", (t.r, t.cols)), self._read(file, f"{target}.B", (t.rows, t.r))

    def weights(self, target: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a weight, flat fp32, put together from the saving ranks' parts."""
        t = self.specs[target]
        if self.manifest.kind != "full":
            raise CheckpointError(f"{self.folder} is a small checkpoint: it holds no weights, only sums; {REMEDY}")
        return self._assemble(target, t.rows, t.cols, start, stop, weights_file)

    def modules_to_save(self, param: str, state: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a parameter of `modules_to_save`, or of a moment of it, flat fp32."""
        assert self.manifest.modules_to_save is not None
        numel = self.manifest.modules_to_save.numels[param]
        return self._assemble(f"{param}.{state}", numel, 1, start, stop, modules_file)

    def _assemble(
        self, name: str, rows: int, cols: int, start: int, stop: int, file_of: Callable[[int, int], str]
    ) -> Tensor:
        """Elements [start, stop) of a (rows × cols) matrix that the saving ranks have written in parts."""
        found, world = torch.empty(stop - start, dtype=torch.float32), self.manifest.world_size
        for rank in range(world):
            part = ShardRange.of(rank, world, rows, cols)
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last:
                key, file = range_key(name, part.start, part.stop), self._open(file_of(rank, world))
                values = self._read(file, key, (part.numel,), slice(first - part.start, last - part.start))
                found[first - start : last - start] = values
        return found

    def rng(self, rank: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """A saving rank's generators: (states by name, those that are text)."""
        file = self._open(rng_file(rank))
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118

    def _open(self, name: str) -> Any:
        try:
            if name not in self._open_files:
                self._open_files[name] = safe_open(self.folder / name, framework="pt")
            return self._open_files[name]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / name} cannot be read ({one_line(error, 160)}): {REMEDY}") from None

    def _read(self, file: Any, key: str, shape: tuple[int, ...], part: slice | None = None) -> Tensor:
        try:
            stored = file.get_slice(key)
            if tuple(stored.get_shape()) != shape or stored.get_dtype() != "F32":
                raise ValueError(f"is {stored.get_dtype()} {tuple(stored.get_shape())}, must be F32 {shape}")
            return stored[part if part is not None else slice(None)]
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{self.folder}: {key} cannot be read ({one_line(error, 160)}): {REMEDY}") from None
