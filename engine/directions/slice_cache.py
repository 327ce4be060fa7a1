"""Slices kept on disk between runs: one safetensors file per target under a key of all that they depend on.

The key is a hash of the checkpoint's files (name, size, time of change), of targets and ranks, of S, method and
tolerance. `index.json` is written last; a folder without it is no cache. Each rank reads only its own slices. That
they belong to the weights is not taken from the key alone: `decompose` multiplies them with the shards.

The folder must be one that all ranks see. Nothing here communicates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import one_line
from ..files import atomic
from ..method.targets import Target

Identity = tuple[str, int, int]
VERSION = 1  # of the format; another one is another key


class SliceCache:
    """The cached slices of one model, one set of targets, one way to decompose them.

    Args:
        root: `hd_pissa.init.cache_dir`; made when first written to.
        targets: in order; files are numbered by it.
        origin: `identity` of the checkpoint's safetensors files, the same on all ranks, though each host may have a
            copy of its own; empty for a model that came from elsewhere.
        how: everything else that the slices depend on, JSON-serialisable.
    """

    EMPTY = "nothing is kept for this model and these settings"

    def __init__(self, root: str | Path, targets: Sequence[Target], *, origin: Sequence[Identity], how: dict[str, Any]):
        self.targets = list(targets)
        key = {
            "version": VERSION,
            "origin": list(origin),
            "targets": [(t.name, t.rows, t.cols, t.r) for t in self.targets],
            **how,
        }
        self.folder = Path(root) / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        self._numbers = {t.name: n for n, t in enumerate(self.targets)}

    def _file(self, name: str) -> Path:
        return self.folder / f"{self._numbers[name]:05d}.safetensors"

    @property
    def _index(self) -> Path:
        return self.folder / "index.json"

    def write(self, name: str, A_SRI: Tensor, B_SOR: Tensor) -> None:
        """Keeps all slices of a target; raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with atomic.replacing(self._file(name)) as draft:
                save_file({"A": A_SRI.float().cpu().contiguous(), "B": B_SOR.float().cpu().contiguous()}, draft)
        except SafetensorError as error:  # its own name for a full disk
            raise OSError(str(error)) from None

    def finish(self, residual: float, worst: str) -> None:
        """Declares the cache complete; call when all targets are written."""
        atomic.write_json(self._index, {"residual": residual, "worst": worst, "targets": len(self.targets)})

    def reached(self) -> tuple[float, str]:
        """(largest residual, its target) when the slices were computed."""
        content = json.loads(self._index.read_text())
        return content["residual"], content["worst"]

    def problem(self) -> str | None:
        """What is wrong with the cache before a file of slices is opened; None for nothing."""
        if not self._index.is_file():
            return self.EMPTY
        try:
            self.reached()
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"damaged ({one_line(error)})"
        return None

    def read(self, name: str, owned: range, A_SRI: Tensor, B_SOR: Tensor) -> str | None:
        """Reads a target's own slices into A (own × R × I), B (own × O × R); what is wrong with the file, or None."""
        try:
            with safe_open(self._file(name), framework="pt") as file:
                for key, into in (("A", A_SRI), ("B", B_SOR)):
                    values = file.get_slice(key)[owned.start : owned.stop]
                    if values.shape != into.shape or values.dtype != into.dtype:
                        found, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (values, into))
                        raise ValueError(f"{key} of {name} is {found}, must be {wanted}")
                    into.copy_(values)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            return f"damaged ({one_line(error)})"
        return None


def identity(files: Iterable[str]) -> list[Identity]:
    """Name, size and time of change of each file."""
    found = [(path, path.stat()) for path in map(Path, sorted(set(files)))]
    return [(path.name, status.st_size, status.st_mtime_ns) for path, status in found]
