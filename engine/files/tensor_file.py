"""The safetensors header, for files that are written piece by piece.

The library's own writer wants all tensors of a file in memory; ours come one after another, from other ranks or in
pieces. The format (https://github.com/huggingface/safetensors): 8 bytes of header length, little-endian; JSON that
gives each tensor's dtype, shape and byte range; then the bytes. Reading is left to the library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping

import torch

from ..errors import ConfigError

DTYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
    torch.uint8: "U8",
}


def header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """What stands before the bytes of tensors that follow in this order; padded to a multiple of 8.

    Args:
        tensors: (name, dtype, shape).

    Raises:
        ConfigError: a dtype that is not among `DTYPE_NAMES`.
    """
    content: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, dtype, shape in tensors:
        if dtype not in DTYPE_NAMES:
            raise ConfigError(f"cannot write {name}: its dtype {dtype} is none that the writer knows")
        end = offset + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
