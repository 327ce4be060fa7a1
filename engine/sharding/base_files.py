"""The safetensors files of a base model, found and read row by row.

What needs the values that training began with (the exact start under bf16 compute, the residual of an adapter, an
export without a process group) looks them up here, a range at a time: files are mapped, nothing is held. Knows
neither ranks nor DeepSpeed. Names come from files of others, so none may point outside the folder.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ConfigError, one_line
from .slicing import ShardRange

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def checkpoint_files(folder_or_name: str) -> dict[str, str]:
    """Tensor name → safetensors file that holds it; empty when there are none on this machine.

    Raises:
        ConfigError: a malformed index, or one that names a file outside the folder; a corrupt file.
    """
    folder = local_folder(folder_or_name)
    if folder is None:
        return {}
    index = folder / INDEX
    if index.is_file():
        return _read_index(index)
    single = folder / SINGLE
    if not single.is_file():
        return {}
    with open_tensors(single) as file:
        return dict.fromkeys(file.keys(), str(single))


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {str(name): Path(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{index}: must be JSON with a weight_map; get the file again") from None
    for file in files.values():
        if str(file) != file.name or file.name == "..":
            raise ConfigError(f"{index} names {file}: must be a file beside it; get the index from where it came")
    return {name: str(index.parent / file) for name, file in files.items()}


def local_folder(folder_or_name: str) -> Path | None:
    """The folder itself, or where the hub's cache has that model; None when this machine does not have it."""
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


def open_tensors(path: str | Path) -> Any:
    """`safe_open`, which checks header and length; ConfigError for a file that is corrupt or missing."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: corrupt safetensors file ({one_line(error)}); download it again") from None


class BaseFiles:
    """The tensors of one base model; opened as they are needed, closed by `with`.

    Attributes:
        source: tensor name → file.
    """

    def __init__(self, folder_or_name: str) -> None:
        self.source = checkpoint_files(folder_or_name)
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def slice(self, name: str) -> Any:
        """The library's slice of a tensor, which knows its shape and dtype and reads what is indexed."""
        path = self.source[name]
        if path not in self._open:
            self._open[path] = self._stack.enter_context(open_tensors(path))
        return self._open[path].get_slice(name)

    def name_of(self, names: Collection[str], rows: int, cols: int) -> str | None:
        """The first of a weight's names under which there is a matrix of this shape."""
        return next((n for n in names if n in self.source and self.slice(n).get_shape() == [rows, cols]), None)

    def read(self, name: str, where: ShardRange) -> Tensor:
        """The elements of a flat range of a matrix, in the file's dtype."""
        if not where.numel:
            return torch.empty(0)
        first = where.start - where.row_start * where.cols
        return self.slice(name)[where.row_start : where.row_stop].flatten()[first : first + where.numel]
